#include "kernels/attention_inputs.h"

#include <algorithm>
#include <vector>

namespace flashclient {

struct AttentionInputs::Heads {
    const AttentionProjection& projection;
    char* products;  // [sequences, tokens, heads, elements]
    HeadRows out;
    size_t elements;
    size_t tokens;
    bool rotates;

    size_t row() const { return projection.weight.rows; }
    size_t heads() const { return row() / elements; }
};

void AttentionInputs::compute(const AttentionLayer& layer, const void* x, size_t sequences, size_t tokens,
                              const Rotation& rotation, const AttentionInput& out) const {
    const size_t rows = sequences * tokens;
    const AttentionProjection* projections[3] = {&layer.query, &layer.key, &layer.value};
    const HeadRows outs[3] = {out.query, out.key, out.value};
    std::vector<char> products[3];
    std::vector<Linear::Projection> multiplied;
    std::vector<Heads> all;
    for (size_t i = 0; i < 3; i++) {
        const AttentionProjection& projection = *projections[i];
        products[i].resize(rows * projection.weight.rows * bytes_of(dtype_));
        multiplied.push_back({projection.weight, projection.bias, products[i].data()});
        all.push_back({projection, products[i].data(), outs[i], layer.elements, tokens, i < 2});
    }
    linear_.project(multiplied, x, rows);
    const auto finish_row = [&](size_t row) {
        for (const Heads& heads : all) finish(heads, row / tokens, row % tokens, rotation, layer.pairs);
    };
    if (rows < workers_.threads()) {
        for (size_t row = 0; row < rows; row++) finish_row(row);
    } else {
        workers_.run(rows, finish_row);
    }
}

void AttentionInputs::finish(const Heads& heads, size_t sequence, size_t token, const Rotation& rotation,
                             Pairs pairs) const {
    const size_t row = heads.row();
    const size_t bytes = bytes_of(dtype_);
    char* products = heads.products + (sequence * heads.tokens + token) * row * bytes;
    const bool turns = heads.rotates && pairs != Pairs::none;
    const AttentionProjection& projection = heads.projection;
    static thread_local std::vector<float> values, angles;
    if (projection.factor != 1.0f) {
        values.resize(row);
        kernels_.upcast(products, row, values.data());
        for (float& value : values) value *= projection.factor;
        kernels_.downcast(values.data(), row, products);
    }
    if (projection.norm) norms_.apply(*projection.norm, products, row / projection.norm->width, products);
    if (turns) {
        values.resize(row);
        kernels_.upcast(products, row, values.data());
        angles.resize(2 * rotation.width);
        const size_t offset = (sequence * rotation.sequence_stride + token * rotation.token_stride) * bytes;
        kernels_.upcast(static_cast<const char*>(rotation.cos) + offset, rotation.width, angles.data());
        kernels_.upcast(static_cast<const char*>(rotation.sin) + offset, rotation.width,
                        angles.data() + rotation.width);
        rotate(values.data(), heads.heads(), heads.elements, angles.data(), angles.data() + rotation.width,
               rotation.width, pairs);
        kernels_.downcast(values.data(), row, products);
    }
    const HeadRows& out = heads.out;
    for (size_t head = 0; head < heads.heads(); head++) {
        const size_t to = sequence * out.sequence_stride + head * out.head_stride + token * heads.elements;
        std::copy_n(products + head * heads.elements * bytes, heads.elements * bytes,
                    static_cast<char*>(out.data) + to * bytes);
    }
}

// x cos + turned(x) sin: each product is rounded, then the sum, which the caller rounds. turned(x) of a pair (a, b) is
// (-b, a).
void AttentionInputs::rotate(float* row, size_t heads, size_t elements, const float* cos, const float* sin,
                             size_t width, Pairs pairs) const {
    static thread_local std::vector<float> turned;
    turned.resize(heads * width);
    const size_t half = width / 2;
    for (size_t head = 0; head < heads; head++) {
        float* x = row + head * elements;
        float* out = turned.data() + head * width;
        if (pairs == Pairs::halves) {
            for (size_t i = 0; i < half; i++) out[i] = -x[i + half] * sin[i];
            for (size_t i = half; i < width; i++) out[i] = x[i - half] * sin[i];
            for (size_t i = 0; i < width; i++) x[i] *= cos[i];
        } else {
            for (size_t i = 0; i < half; i++) {
                out[2 * i] = -x[2 * i + 1] * sin[i];
                out[2 * i + 1] = x[2 * i] * sin[i];
                x[2 * i] *= cos[i];
                x[2 * i + 1] *= cos[i];
            }
        }
    }
    round(turned.data(), heads * width);
    round(row, heads * elements);
    for (size_t head = 0; head < heads; head++) {
        for (size_t i = 0; i < width; i++) row[head * elements + i] += turned[head * width + i];
    }
}

void AttentionInputs::round(float* values, size_t count) const {
    if (dtype_ == Dtype::f32) return;
    static thread_local std::vector<char> rounded;
    rounded.resize(count * bytes_of(dtype_));
    kernels_.downcast(values, count, rounded.data());
    kernels_.upcast(rounded.data(), count, values);
}

}  // namespace flashclient
