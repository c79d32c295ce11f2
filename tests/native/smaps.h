// How the kernel has mapped memory of this process.
#pragma once

#include <cstdint>
#include <fstream>
#include <sstream>
#include <string>

namespace weightd {

// The line `name` of the mapping that begins at `address`, as /proc/self/smaps tells it.
inline std::string smaps_line(const void* address, const std::string& name) {
    std::ifstream maps("/proc/self/smaps");
    std::ostringstream begin;
    begin << std::hex << reinterpret_cast<uintptr_t>(address) << "-";
    bool inside = false;
    for (std::string line; std::getline(maps, line);) {
        const bool heading = line.find('-') < line.find(' ');
        if (heading) inside = line.rfind(begin.str(), 0) == 0;
        if (inside && line.rfind(name, 0) == 0) return line;
    }
    return "";
}

}  // namespace weightd
