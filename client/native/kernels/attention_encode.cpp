#include <algorithm>
#include <cmath>
#include <cstring>

#include "formats/half_values.h"
#include "kernels/attention.h"
#include "kernels/kernels.h"

namespace flashclient {
namespace {

constexpr weightd::BlockRecord RECORD = weightd::BLOCK_FORMATS[static_cast<size_t>(BlockFormat::q8_0)];
constexpr float ROUNDING = 0x1.8p23f;  // adding and subtracting it rounds to an integer, ties to even
constexpr float CODE_MAX = 127.0f;
constexpr uint16_t NAN_HALF = 0x7e00;

// The half-precision number nearest to what makes CODE_MAX of `greatest`. Below the normal ones, where they are far
// apart, the next one if CODE_MAX would be too little.
uint16_t scale_for(float greatest) {
    static const Kernels& halves = kernels_for(Dtype::f16, "portable");
    const float wanted = greatest / CODE_MAX;
    uint16_t half = 0;
    halves.downcast(&wanted, 1, &half);
    if (greatest > (CODE_MAX + 0.5f) * half_values[half]) half++;
    return half;
}

void encode_block(const float* values, uint8_t* block) {
    float greatest = 0.0f, zeros = 0.0f;
    for (size_t i = 0; i < RECORD.values; i++) {
        greatest = std::max(greatest, std::fabs(values[i]));
        zeros += values[i] * 0.0f;
    }
    uint16_t half = zeros == 0.0f ? scale_for(greatest) : NAN_HALF;
    float scale = half_values[half];
    if (!std::isfinite(scale)) {
        half = NAN_HALF;
        scale = 0.0f;
    }
    int8_t codes[RECORD.values] = {};
    if (scale != 0.0f) {
        const float inverse = 1.0f / scale;
        for (size_t i = 0; i < RECORD.values; i++) {
            codes[i] = static_cast<int8_t>(values[i] * inverse + ROUNDING - ROUNDING);
        }
    }
    std::memcpy(block, &half, sizeof(half));
    std::memcpy(block + sizeof(half), codes, sizeof(codes));
}

}  // namespace

void encode_q8_0(const float* values, size_t count, uint8_t* blocks) {
    for (; count >= RECORD.values; count -= RECORD.values, values += RECORD.values, blocks += RECORD.bytes) {
        encode_block(values, blocks);
    }
    if (count == 0) return;
    float last[RECORD.values] = {};
    std::copy_n(values, count, last);
    encode_block(last, blocks);
}

}  // namespace flashclient
