// Memory that this process fills and others map.
#pragma once

#include <cstddef>
#include <span>

#include "device/direct_file.h"

namespace weightd {

// A memfd, mapped here.
//
// After seal() nobody can map it writable, write to it or grow it, whatever descriptor they hold; the mapping here
// stays writable. It can still be truncated, so that drain() gives the memory back while clients map it.
class SharedMemory {
  public:
    SharedMemory() = default;
    SharedMemory(const char* name, size_t bytes);  // throws std::system_error
    SharedMemory(SharedMemory&& other) noexcept;
    SharedMemory& operator=(SharedMemory&& other) noexcept;
    ~SharedMemory();
    // Sets F_SEAL_FUTURE_WRITE | F_SEAL_GROW | F_SEAL_SEAL. shared_fd() is a read-only descriptor from then on.
    void seal();
    // Sets F_SEAL_GROW | F_SEAL_SHRINK | F_SEAL_SEAL: the size is fixed, and both sides may write. shared_fd() is a
    // writable descriptor for the client from then on.
    void fix();
    void drain();  // unmaps it and gives its memory back at once
    // After fix(): unmaps it, closes the client's descriptor, and gives back all memory but the first `kept_bytes`.
    void abandon(size_t kept_bytes);
    bool held_by_others() const;  // after abandon(): whether some process has it mapped or open for writing
    std::byte* data() const { return data_; }
    std::span<std::byte> bytes() const { return {data_, bytes_}; }
    void stop_sharing() { shared_.reset(); }  // after fix(): closes the client's descriptor, which has been sent
    int shared_fd() const { return shared_.get() >= 0 ? shared_.get() : owned_.get(); }

  private:
    Descriptor owned_;
    Descriptor shared_;
    std::byte* data_ = nullptr;
    size_t bytes_ = 0;
};

}  // namespace weightd
