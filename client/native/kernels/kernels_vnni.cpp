// Products of rows in blocks by the instructions for bytes, AVX-512 VNNI; everything else is that of AVX-512.
#include "kernels/kernels.h"

#if defined(__x86_64__)
#include "vectors/intrinsics.h"
#define KERNEL \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,avx2,bmi2,fma,f16c,popcnt")))
#define LANE KERNEL __attribute__((always_inline)) inline

#include "formats/integer_products.h"
#include "formats/integer_slabs.h"

namespace flashclient {
namespace {

size_t packed_bytes(size_t hidden, size_t tokens) { return tokens * stretches_of(hidden) * sizeof(StretchOfX); }

template <bool in_order>
KERNEL void pack(const float* x, size_t hidden, size_t tokens, void* packed) {
    auto* out = static_cast<StretchOfX*>(packed);
    for (size_t t = 0; t < tokens; t++) quantise_row<in_order>(x + t * hidden, hidden, out + t * stretches_of(hidden));
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
struct ByteTable {
    static const Kernels* get() {
        static const Kernels kernels = [] {
            Kernels table = *kernels_avx512(format);
            table.instruction_set = "avx512_vnni";
            table.packed_bytes = packed_bytes;
            table.pack = pack<Codes<format>::IN_ORDER>;
            table.dots = dots<format>;
            table.add_products = add_products<format>;
            return table;
        }();
        return &kernels;
    }
};

}  // namespace
}  // namespace flashclient

const flashclient::Kernels* flashclient::kernels_vnni(Dtype dtype) { return kernels_avx512(dtype); }
const flashclient::Kernels* flashclient::kernels_vnni(BlockFormat format) {
    return table_of_format<ByteTable>(format, kernels_avx512(format));
}
#else
const flashclient::Kernels* flashclient::kernels_vnni(Dtype) { return nullptr; }
const flashclient::Kernels* flashclient::kernels_vnni(BlockFormat) { return nullptr; }
#endif
