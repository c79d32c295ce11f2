// Products of rows in blocks by the instructions for bytes, AVX-512 VNNI; everything else is that of AVX-512.
#include "kernels/kernels.h"

#if defined(__x86_64__)
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // false in GCC 12's own header (its bug 105593)
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#define KERNEL \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,avx2,bmi2,fma,f16c,popcnt")))
#define LANE KERNEL __attribute__((always_inline)) inline

#include "formats/integer_products.h"

namespace flashclient {
namespace {

size_t packed_bytes(size_t hidden, size_t tokens) { return tokens * stretches_of(hidden) * sizeof(StretchOfX); }

KERNEL void pack(const float* x, size_t hidden, size_t tokens, void* packed) {
    auto* out = static_cast<StretchOfX*>(packed);
    for (size_t t = 0; t < tokens; t++) quantise_row(x + t * hidden, hidden, out + t * stretches_of(hidden));
}

template <BlockFormat format>
KERNEL void dots(const void* const* rows, size_t row_count, const void* packed, size_t hidden, size_t tokens,
                 float* dots) {
    const auto* x = static_cast<const StretchOfX*>(packed);
    if (tokens == 1) {
        dots_of_quads<format, true>(rows, row_count, x, hidden, 1, dots);
    } else {
        dots_of_quads<format, false>(rows, row_count, x, hidden, tokens, dots);
    }
}

template <BlockFormat format>
const Kernels* table_of() {
    static const Kernels kernels = [] {
        Kernels table = *kernels_avx512(format);
        table.packed_bytes = packed_bytes;
        table.pack = pack;
        table.dots = dots<format>;
        return table;
    }();
    return &kernels;
}

}  // namespace
}  // namespace flashclient

const flashclient::Kernels* flashclient::kernels_vnni(BlockFormat format) {
    switch (format) {
        case BlockFormat::q8_0:
            return table_of<BlockFormat::q8_0>();
        case BlockFormat::q4_0:
            return table_of<BlockFormat::q4_0>();
        case BlockFormat::q4_1:
            return table_of<BlockFormat::q4_1>();
        case BlockFormat::iq4_nl:
            return table_of<BlockFormat::iq4_nl>();
        case BlockFormat::q5_0:
            return table_of<BlockFormat::q5_0>();
        case BlockFormat::q5_1:
            return table_of<BlockFormat::q5_1>();
        case BlockFormat::mxfp4:
            return table_of<BlockFormat::mxfp4>();
        case BlockFormat::q2_k:
            return table_of<BlockFormat::q2_k>();
        case BlockFormat::q3_k:
            return table_of<BlockFormat::q3_k>();
        case BlockFormat::q4_k:
            return table_of<BlockFormat::q4_k>();
        case BlockFormat::q5_k:
            return table_of<BlockFormat::q5_k>();
        case BlockFormat::q6_k:
            return table_of<BlockFormat::q6_k>();
        case BlockFormat::iq4_xs:
            return table_of<BlockFormat::iq4_xs>();
    }
    return nullptr;
}
#else
const flashclient::Kernels* flashclient::kernels_vnni(BlockFormat) { return nullptr; }
#endif
