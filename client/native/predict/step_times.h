// Where the time of a step goes.
#pragma once

#include <chrono>
#include <utility>

namespace flashclient {

struct StepTimes {
    double predict_s = 0;
    double acquire_s = 0;  // asking for cells, and giving them back
    double compute_s = 0;  // kernels on bundles
    double wait_s = 0;     // for bundles
};

// Adds the time since the last call to a part.
class StepTimer {
  public:
    void lap(double& part_s) {
        const auto now = std::chrono::steady_clock::now();
        part_s += std::chrono::duration<double>(now - std::exchange(last_, now)).count();
    }
    StepTimes times;

  private:
    std::chrono::steady_clock::time_point last_ = std::chrono::steady_clock::now();
};

}  // namespace flashclient
