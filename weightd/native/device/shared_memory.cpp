#include "device/shared_memory.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <string>
#include <utility>

#include "device/system_error.h"
#include "huge_pages.h"

#ifndef F_SEAL_FUTURE_WRITE
#define F_SEAL_FUTURE_WRITE 0x0010
#endif

namespace weightd {
namespace {

void check(int result, const char* what) {
    if (result < 0) fail(what);
}

Descriptor reopened(const Descriptor& memory, int flags) {
    const std::string path = "/proc/self/fd/" + std::to_string(memory.get());
    Descriptor again(::open(path.c_str(), flags | O_CLOEXEC));
    check(again.get(), "reopening a memfd");
    return again;
}

}  // namespace

SharedMemory::SharedMemory(const char* name, size_t bytes) : bytes_(bytes) {
    owned_ = Descriptor(::memfd_create(name, MFD_CLOEXEC | MFD_ALLOW_SEALING));
    check(owned_.get(), "memfd_create");
    check(::fchmod(owned_.get(), 0400), "fchmod of a memfd");
    check(::ftruncate(owned_.get(), static_cast<off_t>(bytes)), "ftruncate of a memfd");
    void* mapped = map_for_huge_pages(bytes, PROT_READ | PROT_WRITE, MAP_SHARED, owned_.get());
    if (mapped == MAP_FAILED) fail("mmap of a memfd");
    data_ = static_cast<std::byte*>(mapped);
    // Has an effect where shmem_enabled says "advise"; elsewhere the populator asks for each. Only for whole huge
    // pages: older kernels (6.1) give a last part a huge page that goes beyond the end, which is more memory than the
    // account has granted.
    const size_t whole_bytes = bytes / HUGE_PAGE_BYTES * HUGE_PAGE_BYTES;
    if (whole_bytes > 0) ::madvise(data_, whole_bytes, MADV_HUGEPAGE);
    if (whole_bytes < bytes) ::madvise(data_ + whole_bytes, bytes - whole_bytes, MADV_NOHUGEPAGE);
}

SharedMemory::SharedMemory(SharedMemory&& other) noexcept { *this = std::move(other); }

SharedMemory& SharedMemory::operator=(SharedMemory&& other) noexcept {
    std::swap(owned_, other.owned_);
    std::swap(shared_, other.shared_);
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    return *this;
}

SharedMemory::~SharedMemory() {
    if (data_ != nullptr) ::munmap(data_, bytes_);
}

void SharedMemory::seal() {
    check(::fcntl(owned_.get(), F_ADD_SEALS, F_SEAL_FUTURE_WRITE | F_SEAL_GROW | F_SEAL_SEAL), "sealing a memfd");
    shared_ = reopened(owned_, O_RDONLY);
}

// The kernel counts who has a file open for writing, but not the descriptor that memfd_create() gave.
void SharedMemory::fix() {
    check(::fcntl(owned_.get(), F_ADD_SEALS, F_SEAL_GROW | F_SEAL_SHRINK | F_SEAL_SEAL), "sealing a memfd");
    check(::fchmod(owned_.get(), 0600), "fchmod of a memfd");
    shared_ = reopened(owned_, O_RDWR);
    owned_ = reopened(owned_, O_RDWR);
    check(::fchmod(owned_.get(), 0400), "fchmod of a memfd");
}

void SharedMemory::abandon(size_t kept_bytes) {
    ::munmap(std::exchange(data_, nullptr), bytes_);
    shared_.reset();
    const auto kept = static_cast<off_t>(kept_bytes);
    const auto rest = static_cast<off_t>(bytes_) - kept;
    check(::fallocate(owned_.get(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, kept, rest), "emptying a memfd");
}

// The kernel gives a write lease only on a file that nobody else has open for writing or mapped. If a process opens it
// during the lease (root can), the kernel sends us a signal: SIGURG, because the default, SIGIO, would end us.
bool SharedMemory::held_by_others() const {
    ::fcntl(owned_.get(), F_SETSIG, SIGURG);
    if (::fcntl(owned_.get(), F_SETLEASE, F_WRLCK) < 0) return errno == EAGAIN;
    ::fcntl(owned_.get(), F_SETLEASE, F_UNLCK);
    return false;
}

void SharedMemory::drain() {
    if (data_ == nullptr) return;
    ::munmap(data_, bytes_);
    data_ = nullptr;
    check(::ftruncate(owned_.get(), 0), "emptying a memfd");
}

}  // namespace weightd
