// Turns at opening a model. Its openers take turns, because what the first one reads into memory serves the others.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <map>
#include <mutex>
#include <string>

#include "device/clock.h"

namespace weightd {

class OpenerTurns {
  public:
    // `stopping`: whether the daemon is stopping, which ends all waiting for a turn.
    OpenerTurns(std::chrono::milliseconds answer_within, std::function<bool()> stopping)
        : answer_within_(answer_within), stopping_(std::move(stopping)) {}

    // A caller's turn at one model, until it is destroyed. Any thread may take one.
    class Turn {
      public:
        // Waits for the turns before it, as long as the device answers them. Throws Unanswered, Stopping.
        Turn(OpenerTurns& turns, uint32_t model, const std::string& name);
        ~Turn();
        Turn(const Turn&) = delete;
        Turn& operator=(const Turn&) = delete;
        void note_progress();  // the device has answered

      private:
        OpenerTurns& turns_;
        const uint32_t model_;
    };

  private:
    const std::chrono::milliseconds answer_within_;
    const std::function<bool()> stopping_;
    std::mutex lock_;  // guards answered_
    std::condition_variable ended_;
    std::map<uint32_t, Clock::time_point> answered_;  // by model whose turn is taken: when the device last answered
};

}  // namespace weightd
