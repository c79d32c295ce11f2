// The FFN of exact mode: the sum over all neurons of a layer, chunk after chunk.
#pragma once

#include <cstddef>
#include <cstdint>

#include "ffn/ffn.h"
#include "predict/chunk_source.h"
#include "predict/step_times.h"

namespace flashclient {

// The rows of one step.
struct ExactRows {
    const float* bias;     // [neurons], by position; null: none
    const float* up_bias;  // likewise (ffn.h)
    const float* x;        // [tokens, hidden]
    size_t tokens;
};

class ExactStep {
  public:
    // Both must outlive this.
    ExactStep(const Ffn& ffn, ChunkSource& source) : ffn_(ffn), source_(source) {}

    // y [tokens, hidden] = the sum. One thread at a time; it uses the source only while it takes a chunk. Throws what
    // ChunkSource::next() and Ffn::add_rows() throw; y holds no result then.
    StepTimes run(uint32_t layer, const ExactRows& rows, float* y);

    const FfnShape& shape() const { return ffn_.shape(); }

  private:
    const ChunkSource::Bundles* next(uint32_t layer);

    const Ffn& ffn_;
    ChunkSource& source_;
};

}  // namespace flashclient
