#include "kernels/readable_memory.h"

#include <pthread.h>

#include <algorithm>
#include <condition_variable>
#include <cstdio>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>

namespace flashclient {
namespace {

std::mutex table_lock;  // guards everything below; held across fork(), so that a child finds it consistent
std::condition_variable reading_ended;
std::vector<ReadableMemory*> table;  // by rising begin; a child begins with an empty one

void watch_forks() {
    static const int once =
        ::pthread_atfork([] { table_lock.lock(); }, [] { table_lock.unlock(); },
                         [] {
                             table.clear();
                             new (&reading_ended) std::condition_variable;  // no thread waits in the child
                             table_lock.unlock();
                         });
    static_cast<void>(once);
}

std::string in_hexadecimal(uint64_t address) {
    char text[2 + 16 + 1];
    std::snprintf(text, sizeof text, "0x%llx", static_cast<unsigned long long>(address));
    return text;
}

}  // namespace

TableLock::TableLock() { table_lock.lock(); }
TableLock::~TableLock() { table_lock.unlock(); }

ReadableMemory::ReadableMemory(const void* data, size_t bytes)
    : begin_(reinterpret_cast<uintptr_t>(data)), end_(begin_ + bytes) {
    watch_forks();
    const TableLock lock;
    const auto after = [](uintptr_t begin, const ReadableMemory* other) { return begin < other->begin_; };
    table.insert(std::upper_bound(table.begin(), table.end(), begin_, after), this);
}

ReadableMemory::~ReadableMemory() {
    std::unique_lock lock(table_lock);
    if (std::erase(table, this) == 0) return;  // after fork(): the readings are the parent's
    reading_ended.wait(lock, [this] { return readings_ == 0; });
}

Reading::~Reading() {
    const TableLock lock;
    for (ReadableMemory* memory : memories_) {
        if (--memory->readings_ == 0) reading_ended.notify_all();
    }
}

// Called with the table locked.
void Reading::require_elsewhere(uint64_t address) {
    const auto after = [](uint64_t wanted, const ReadableMemory* other) { return wanted < other->begin_; };
    const auto found = std::upper_bound(table.begin(), table.end(), address, after);
    ReadableMemory* memory = found == table.begin() ? nullptr : *(found - 1);
    if (memory == nullptr || address > memory->end_ || memory->end_ - address < bundle_bytes_) {
        throw std::invalid_argument("no bundle lies at " + in_hexadecimal(address) +
                                    ": addresses come from a source that is open");
    }
    if ((address & (alignment_ - 1)) != 0) {
        throw std::invalid_argument("the bundle at " + in_hexadecimal(address) + " is not aligned to its elements");
    }
    begin_ = memory->begin_;
    beyond_ = memory->end_ - memory->begin_ - bundle_bytes_ + 1;
    if (std::find(memories_.begin(), memories_.end(), memory) == memories_.end()) {
        memories_.push_back(memory);
        memory->readings_++;
    }
}

}  // namespace flashclient
