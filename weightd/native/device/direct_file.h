// A file opened for uncached reading.
#pragma once

#include <cstdint>
#include <string>

namespace weightd {

class Descriptor {  // owns a file descriptor
  public:
    Descriptor() = default;
    explicit Descriptor(int fd) : fd_(fd) {}
    Descriptor(Descriptor&& other) noexcept : fd_(other.release()) {}
    Descriptor& operator=(Descriptor&& other) noexcept;
    ~Descriptor() { reset(); }
    int get() const { return fd_; }
    int release();
    void reset();

  private:
    int fd_ = -1;
};

class DirectFile {
  public:
    // Opens `path` read-only with O_DIRECT. If the file system refuses O_DIRECT, throws std::system_error (EINVAL).
    // With `allow_buffered`, the file is then read through the page cache, and what was read is dropped from the cache.
    DirectFile(const std::string& path, bool allow_buffered);

    int fd() const { return file_.get(); }
    bool buffered() const { return buffered_; }
    uint64_t size_bytes() const { return size_bytes_; }
    const std::string& path() const { return path_; }

  private:
    std::string path_;
    Descriptor file_;
    bool buffered_ = false;
    uint64_t size_bytes_ = 0;
};

}  // namespace weightd
