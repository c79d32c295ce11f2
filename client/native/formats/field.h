// What codes_*.h have in common.
#pragma once

#include <cstddef>

namespace flashclient {
namespace {

// Which bits of a byte are a part of a code.
struct Field {
    size_t first;
    unsigned count;

    int mask() const { return (1 << count) - 1; }
};

}  // namespace
}  // namespace flashclient
