#include "pool/memory.h"

#include <cassert>
#include <fstream>
#include <map>
#include <string>

namespace weightd {

bool Memory::take(Account account, uint64_t bytes) {
    if (bytes > free_bytes()) return false;
    used_bytes_[static_cast<size_t>(account)] += bytes;
    return true;
}

void Memory::give(Account account, uint64_t bytes) {
    assert(used_bytes_[static_cast<size_t>(account)] >= bytes);
    used_bytes_[static_cast<size_t>(account)] -= bytes;
}

bool machine_is_short() {
    std::ifstream lines("/proc/meminfo");
    std::map<std::string, uint64_t> fields;  // in kB
    std::string name;
    std::string rest;
    for (uint64_t amount = 0; lines >> name >> amount && std::getline(lines, rest);) fields[name] = amount;
    return fields["MemAvailable:"] < fields["MemTotal:"] / 8;
}

}  // namespace weightd
