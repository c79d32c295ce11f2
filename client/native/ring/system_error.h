// Failed system calls.
#pragma once

#include <cerrno>
#include <string>
#include <system_error>

namespace flashclient {

[[noreturn]] inline void fail(const std::string& what, int error = errno) {
    throw std::system_error(error, std::generic_category(), what);
}

}  // namespace flashclient
