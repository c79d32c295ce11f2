// Encodings, and bundles whose parts differ in theirs.
#include "encoding.h"

#include <gtest/gtest.h>

#include <cstring>
#include <stdexcept>
#include <vector>

#include "bundle/bundle.h"
#include "device/checksum.h"

namespace weightd {
namespace {

TEST(Encoding, IsPlainOnlyWhereNumbersStandAlone) {
    EXPECT_EQ(plain_encoding(Dtype::bf16).plain(), Dtype::bf16);
    EXPECT_EQ((Encoding{"BF16", 2, 4, Scales::none}).plain(), std::nullopt);
    EXPECT_EQ((Encoding{"F32", 1, 2, Scales::none}).plain(), std::nullopt);
    EXPECT_EQ((Encoding{"Q4_K", 256, 144, Scales::in_block}).plain(), std::nullopt);
    EXPECT_EQ(dtype_named("F64"), std::nullopt);
}

TEST(Encoding, SizesAreThoseOfWholeBlocks) {
    EXPECT_EQ(plain_encoding(Dtype::f32).bytes_of(7), 28U);
    EXPECT_EQ((Encoding{"Q4_K", 256, 144, Scales::in_block}).bytes_of(512), 288U);
}

// up in F32, down in BF16: the values are those of the matrices, each in its own width.
TEST(CutBundles, PartsMayDifferInEncoding) {
    const BundleShape shape{{plain_encoding(Dtype::f32), plain_encoding(Dtype::bf16)}, 2, 64, 1, 64};
    EXPECT_EQ(shape.bundle_bytes(), 12U);
    const std::vector<float> up = {1.5f, -2.0f, 3.0f, 4.0f};              // [neurons, hidden]
    const std::vector<uint16_t> down = {0x3f80, 0x4000, 0x4040, 0x4080};  // [hidden, neurons]: 1, 2; 3, 4
    std::vector<std::byte> cells(128, std::byte{0xff});
    std::vector<uint64_t> checksums(2);
    const PartMatrix parts[] = {{reinterpret_cast<const std::byte*>(up.data()), Dtype::f32, false, 2, 0, 1},
                                {reinterpret_cast<const std::byte*>(down.data()), Dtype::bf16, true, 2, 0, 1}};
    cut_bundles(shape, parts, cells.data(), checksums);
    for (size_t neuron = 0; neuron < 2; neuron++) {
        const std::byte* bundle = cells.data() + neuron * 64;
        EXPECT_EQ(std::memcmp(bundle, up.data() + neuron * 2, 8), 0);
        const uint16_t column[] = {down[neuron], down[neuron + 2]};
        EXPECT_EQ(std::memcmp(bundle + 8, column, 4), 0);
        EXPECT_EQ(checksums[neuron], checksum({bundle, 12}));
        for (size_t i = 12; i < 64; i++) EXPECT_EQ(bundle[i], std::byte{0});
    }
}

TEST(CutBundles, RefusesWhatHasNoQuantiser) {
    const BundleShape shape{{plain_encoding(Dtype::f32), {"Q4_K", 256, 144, Scales::in_block}}, 256, 1216, 1, 1216};
    EXPECT_THROW(cut_bundles(shape, {}, nullptr, {}), std::invalid_argument);
    const BundleShape no_blocks{{{"Q8_0", 32, 34, Scales::in_block}}, 40, 64, 1, 64};
    EXPECT_THROW(cut_bundles(no_blocks, {}, nullptr, {}), std::invalid_argument);
    float value = 1.0f;
    int8_t target = 0;
    EXPECT_THROW(convert(reinterpret_cast<const std::byte*>(&value), Dtype::f32, reinterpret_cast<std::byte*>(&target),
                         Dtype::i8, 1),
                 std::invalid_argument);
}

}  // namespace
}  // namespace weightd
