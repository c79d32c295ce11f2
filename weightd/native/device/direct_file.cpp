#include "device/direct_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <utility>

#include "device/system_error.h"

namespace weightd {

Descriptor& Descriptor::operator=(Descriptor&& other) noexcept {
    if (this != &other) {
        reset();
        fd_ = other.release();
    }
    return *this;
}

int Descriptor::release() { return std::exchange(fd_, -1); }

void Descriptor::reset() {
    if (fd_ >= 0) ::close(fd_);
    fd_ = -1;
}

DirectFile::DirectFile(const std::string& path, bool allow_buffered) : path_(path) {
    file_ = Descriptor(::open(path.c_str(), O_RDONLY | O_DIRECT | O_CLOEXEC));
    if (file_.get() < 0 && errno == EINVAL && allow_buffered) {
        buffered_ = true;
        file_ = Descriptor(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
    }
    struct stat status {};
    if (file_.get() < 0 || ::fstat(file_.get(), &status) < 0) {
        const char* advice =
            ": the file system refuses O_DIRECT (move the store to one that takes it, or pass --allow-buffered)";
        fail(errno == EINVAL ? path + advice : path);
    }
    size_bytes_ = static_cast<uint64_t>(status.st_size);
}

}  // namespace weightd
