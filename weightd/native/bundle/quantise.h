// Quantises rows of weights while they are imported.
//
// The scale of a block is chosen so that the sum of squared differences is small, not so that its largest value is
// exact: several scales are tried, each is fitted to the codes that it gives, and the best one counts. Bits depend on
// the values alone, not on the processor.
#pragma once

#include <cstddef>
#include <stdexcept>

#include "encoding.h"

namespace weightd {

// A value that has no place in a block: NaN, infinite, or with a scale that half precision does not hold.
class UnquantisableValue : public std::runtime_error {
  public:
    explicit UnquantisableValue(const char* what, size_t neuron = 0) : std::runtime_error(what), neuron(neuron) {}
    size_t neuron;  // cut_bundles() sets it: the index in the run
};

// Sums over all values that were quantised.
struct QuantisationError {
    double squared_differences = 0.0;
    double squares = 0.0;
};

// Whether quantise() knows the format: Q8_0 and IQ4_NL.
bool has_quantiser(BlockFormat format);

// Writes `count` values, whole blocks, as blocks of `format` and adds to `error`. Throws UnquantisableValue.
void quantise(BlockFormat format, const float* values, size_t count, std::byte* blocks, QuantisationError& error);

}  // namespace weightd
