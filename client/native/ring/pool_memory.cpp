#include "ring/pool_memory.h"

#include <signal.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <utility>

#include "huge_pages.h"
#include "ring/system_error.h"

namespace flashclient {
namespace {

// The most segments that all sessions of this process map: 512 GiB of the largest ones, more than a client maps.
constexpr size_t RANGES_MAX = 8192;

struct AddressRange {
    std::atomic<uintptr_t> begin = 0;  // 0: the entry is free
    std::atomic<uintptr_t> end = 0;
    std::atomic<std::atomic<bool>*> revoked = nullptr;
};

// The signal handler reads it, so entries are read without a lock and never move.
std::array<AddressRange, RANGES_MAX> ranges;
std::mutex ranges_lock;  // guards the choice of free entries
struct sigaction handler_before;
uintptr_t page_bytes = 4096;

// A plain system call: this runs in a signal handler, and a sanitizer takes libc's mmap() for a write that races with
// readers.
bool zeros_at(uintptr_t begin, size_t bytes) {
    constexpr long FLAGS = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE;
    return ::syscall(SYS_mmap, begin, bytes, long{PROT_READ}, FLAGS, -1L, 0L) != -1;
}

// Called after a read of a segment that weightd has emptied. Maps zeros at the page, so that the read goes on.
bool patch(uintptr_t address) {
    for (AddressRange& range : ranges) {
        const uintptr_t begin = range.begin.load();
        if (begin == 0 || address < begin || address >= range.end.load()) continue;
        range.revoked.load()->store(true);
        return zeros_at(address / page_bytes * page_bytes, page_bytes);
    }
    return false;
}

void handle_bus_error(int signal, siginfo_t* info, void*) {
    const int error = errno;
    const bool patched = info->si_code == BUS_ADRERR && patch(reinterpret_cast<uintptr_t>(info->si_addr));
    errno = error;
    if (patched) return;
    // Not our fault address: restores the previous handler. The read is retried, and faults again.
    ::sigaction(signal, &handler_before, nullptr);
    if (info->si_code <= 0) ::raise(signal);  // signal sent by kill(): re-raises it
}

void install_handler() {
    page_bytes = static_cast<uintptr_t>(::sysconf(_SC_PAGESIZE));
    struct sigaction action {};
    action.sa_sigaction = handle_bus_error;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    ::sigemptyset(&action.sa_mask);
    ::sigaction(SIGBUS, &action, &handler_before);
}

bool enter_range(const PoolMemory::Segment& segment, std::atomic<bool>& revoked) {
    const std::lock_guard guard(ranges_lock);
    for (AddressRange& range : ranges) {
        if (range.begin.load() != 0) continue;
        range.revoked.store(&revoked);
        range.end.store(reinterpret_cast<uintptr_t>(segment.data) + segment.bytes);
        range.begin.store(reinterpret_cast<uintptr_t>(segment.data));
        return true;
    }
    return false;
}

void leave_range(const PoolMemory::Segment& segment) {
    for (AddressRange& range : ranges) {
        if (range.begin.load() == reinterpret_cast<uintptr_t>(segment.data)) range.begin.store(0);
    }
}

}  // namespace

PoolMemory::PoolMemory() : owner_(::getpid()) {
    static std::once_flag once;
    std::call_once(once, install_handler);
}

bool PoolMemory::map(uint32_t number, int fd, size_t bytes) {
    const std::lock_guard guard(lock_);
    void* mapped = MAP_FAILED;
    if (!revoked()) mapped = weightd::map_for_huge_pages(bytes, PROT_READ, MAP_SHARED, fd);
    const int error = errno;
    ::close(fd);
    if (revoked()) return false;
    if (mapped == MAP_FAILED) fail("mapping a segment", error);
    ::madvise(mapped, bytes, MADV_DONTFORK);  // a child may not use it, and would keep its memory alive
    Segment segment{static_cast<std::byte*>(mapped), bytes};
    if (!enter_range(segment, revoked_)) {
        ::munmap(mapped, bytes);
        fail("too many segments of the pool are mapped", ENOMEM);
    }
    segment.readable = std::make_unique<ReadableMemory>(mapped, bytes);
    segments_[number] = std::move(segment);
    return true;
}

const PoolMemory::Segment* PoolMemory::find(uint32_t number) {
    if (found_ != nullptr && found_number_ == number) return found_;
    const auto found = segments_.find(number);
    if (found == segments_.end()) return nullptr;
    found_number_ = number;
    return found_ = &found->second;
}

void PoolMemory::unmap(uint32_t number) {
    const std::lock_guard guard(lock_);
    const auto found = segments_.find(number);
    if (found == segments_.end()) return;
    drop(found->second);
    found_ = nullptr;
    segments_.erase(found);
}

void PoolMemory::clear() {
    if (::getpid() != owner_) return;  // a child has inherited no segment, and lock_ may be locked
    const std::lock_guard guard(lock_);
    for (auto& [number, segment] : segments_) drop(segment);
    found_ = nullptr;
    segments_.clear();
    revoked_.store(false);
}

void PoolMemory::drop(Segment& segment) const {
    segment.readable.reset();
    leave_range(segment);
    ::munmap(segment.data, segment.bytes);
}

void PoolMemory::revoke() {
    revoked_.store(true);  // first: whoever reads zeros must find it set
    const std::lock_guard guard(lock_);
    for (const auto& [number, segment] : segments_) zeros_at(reinterpret_cast<uintptr_t>(segment.data), segment.bytes);
}

}  // namespace flashclient
