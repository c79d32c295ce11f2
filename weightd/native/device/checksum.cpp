#include "device/checksum.h"

#include <new>

#if defined(__x86_64__)
#include <xxh_x86dispatch.h>
#else
#define XXH3_64bits_dispatch XXH3_64bits
#define XXH3_64bits_update_dispatch XXH3_64bits_update
#endif
#include <xxhash.h>

namespace weightd {

uint64_t checksum(std::span<const std::byte> bytes) { return XXH3_64bits_dispatch(bytes.data(), bytes.size()); }

void Checksum::Free::operator()(XXH3_state_s* state) const { XXH3_freeState(state); }

Checksum::Checksum() : state_(XXH3_createState()) {
    if (!state_) throw std::bad_alloc();
    XXH3_64bits_reset(state_.get());
}

void Checksum::update(std::span<const std::byte> bytes) {
    XXH3_64bits_update_dispatch(state_.get(), bytes.data(), bytes.size());
}

uint64_t Checksum::value() const { return XXH3_64bits_digest(state_.get()); }

}  // namespace weightd
