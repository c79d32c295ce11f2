#include "ring/exact_step.h"

#include <algorithm>

#include "ffn/ffn_sum.h"

namespace flashclient {

StepTimes ExactStep::run(uint32_t layer, const ExactRows& rows, float* y) {
    StepTimer timer;
    std::fill_n(y, rows.tokens * ffn_.shape().hidden, 0.0f);
    try {
        FfnSum sum(ffn_, rows.x, rows.tokens, y);
        while (const ChunkSource::Bundles* chunk = next(layer)) {
            timer.lap(timer.times.wait_s);
            Neurons list{chunk->addresses};
            if (rows.bias != nullptr) list.bias = rows.bias + chunk->first_position * ffn_.shape().neurons;
            if (rows.up_bias != nullptr) list.up_bias = rows.up_bias + chunk->first_position * ffn_.shape().neurons;
            sum.add(list);
            timer.lap(timer.times.compute_s);
        }
        timer.lap(timer.times.wait_s);
        sum.finish();
        timer.lap(timer.times.compute_s);
    } catch (...) {
        const auto use = source_.use();
        source_.leave();
        throw;
    }
    timer.lap(timer.times.wait_s);
    return timer.times;
}

const ChunkSource::Bundles* ExactStep::next(uint32_t layer) {
    const auto use = source_.use();
    return source_.next(layer);
}

}  // namespace flashclient
