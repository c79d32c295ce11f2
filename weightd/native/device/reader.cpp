#include "device/reader.h"

#include <algorithm>
#include <cerrno>
#include <stdexcept>
#include <system_error>

#include "device/system_error.h"

namespace weightd {

size_t Read::length_bytes() const {
    size_t bytes = 0;
    for (const iovec& piece : pieces) bytes += piece.iov_len;
    return bytes;
}

size_t Read::expected_bytes() const {
    const uint64_t left = file->size_bytes() > offset_bytes ? file->size_bytes() - offset_bytes : 0;
    return std::min<uint64_t>(length_bytes(), left);
}

Read::Left Read::advance(size_t done_bytes) {
    if (done_bytes >= expected_bytes()) return Left::nothing;
    done_bytes -= done_bytes % READ_STEP_BYTES;
    if (done_bytes == 0) return Left::stuck;
    offset_bytes += done_bytes;
    size_t first = 0;
    while (done_bytes >= pieces[first].iov_len) done_bytes -= pieces[first++].iov_len;
    pieces.erase(pieces.begin(), pieces.begin() + static_cast<ptrdiff_t>(first));
    pieces[0].iov_base = static_cast<std::byte*>(pieces[0].iov_base) + done_bytes;
    pieces[0].iov_len -= done_bytes;
    return Left::more;
}

#ifndef WEIGHTD_HAVE_URING
std::unique_ptr<Reader> make_uring_reader(uint32_t, std::string&) { fail("io_uring: built without liburing", ENOSYS); }
#endif

std::unique_ptr<Reader> make_reader(const std::string& kind, uint32_t threads, uint32_t depth, std::string& note) {
    if (depth == 0) depth = DEPTH_DEFAULT;
    if (kind == "threads") return make_thread_reader(threads);
    if (kind != "auto" && kind != "io_uring") {
        throw std::invalid_argument("unknown io engine '" + kind + "': try auto, io_uring or threads");
    }
    try {
        return make_uring_reader(depth, note);
    } catch (const std::system_error& error) {
        if (kind == "io_uring") throw;
        note = std::string(error.what()) + "; reading with threads instead";
        return make_thread_reader(threads);
    }
}

}  // namespace weightd
