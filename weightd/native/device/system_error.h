// Failed system calls.
#pragma once

#include <cerrno>
#include <string>
#include <system_error>

namespace weightd {

[[noreturn]] inline void fail(const std::string& what, int error = errno) {
    throw std::system_error(error, std::generic_category(), what);
}

inline bool out_of_descriptors(int error) { return error == EMFILE || error == ENFILE; }

}  // namespace weightd
