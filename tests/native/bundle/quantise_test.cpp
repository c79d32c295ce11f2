// Quantising at import. tests/weightd/importing/test_quantising.py compares it with gguf-py.
#include "bundle/quantise.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <vector>

namespace weightd {
namespace {

class Quantise : public testing::TestWithParam<BlockFormat> {
  protected:
    const BlockRecord& record() const { return BLOCK_FORMATS[static_cast<size_t>(GetParam())]; }

    std::vector<std::byte> blocks(const std::vector<float>& values, QuantisationError& error) const {
        std::vector<std::byte> made(values.size() / record().values * record().bytes, std::byte{0xff});
        quantise(GetParam(), values.data(), values.size(), made.data(), error);
        return made;
    }
};

TEST_P(Quantise, WritesEveryByteOfItsBlocks) {
    QuantisationError error;
    EXPECT_EQ(blocks(std::vector<float>(64, 0.0f), error), blocks(std::vector<float>(64, -0.0f), error));
    EXPECT_EQ(error.squares, 0.0);
    EXPECT_EQ(error.squared_differences, 0.0);
}

TEST_P(Quantise, AddsTheErrorUp) {
    std::vector<float> values(320);
    for (size_t i = 0; i < values.size(); i++) values[i] = std::sin(static_cast<float>(i * i));
    QuantisationError error;
    blocks(values, error);
    double squares = 0.0;
    for (const float value : values) squares += static_cast<double>(value) * static_cast<double>(value);
    EXPECT_NEAR(error.squares, squares, 1e-4);
    const double relative = std::sqrt(error.squared_differences / squares);
    EXPECT_GT(relative, 0.0);
    EXPECT_LT(relative, GetParam() == BlockFormat::q8_0 ? 0.01 : 0.1);
}

TEST_P(Quantise, RefusesWhatHasNoPlace) {
    constexpr float INF = std::numeric_limits<float>::infinity();
    for (const float wrong : {NAN, INF, -INF, 3e38f}) {
        std::vector<float> values(64, 1.0f);
        values[40] = wrong;
        QuantisationError error;
        EXPECT_THROW(blocks(values, error), UnquantisableValue);
    }
}

INSTANTIATE_TEST_SUITE_P(Formats, Quantise, testing::Values(BlockFormat::q8_0, BlockFormat::iq4_nl));

TEST(QuantiseFormats, OnlySomeAreWritten) {
    QuantisationError error;
    EXPECT_FALSE(has_quantiser(BlockFormat::q4_1));
    EXPECT_THROW(quantise(BlockFormat::q4_1, nullptr, 0, nullptr, error), std::invalid_argument);
}

}  // namespace
}  // namespace weightd
