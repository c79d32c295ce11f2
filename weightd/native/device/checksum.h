// XXH3-64, the checksum of everything in a store.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

struct XXH3_state_s;  // of xxhash

namespace weightd {

// XXH3-64 with the widest vectors this processor has.
uint64_t checksum(std::span<const std::byte> bytes);

// The same of bytes that come in pieces.
class Checksum {
  public:
    Checksum();
    void update(std::span<const std::byte> bytes);
    uint64_t value() const;

  private:
    struct Free {
        void operator()(XXH3_state_s* state) const;
    };
    std::unique_ptr<XXH3_state_s, Free> state_;
};

}  // namespace weightd
