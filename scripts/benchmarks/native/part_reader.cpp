#include "part_reader.h"

#include <algorithm>
#include <iterator>
#include <utility>

namespace weightd {

PartReader::PartReader(std::unique_ptr<Reader> reader, size_t part_bytes)
    : reader_(std::move(reader)), part_bytes_(part_bytes) {}

int PartReader::register_memory(std::span<std::byte> memory) {
    memory_.emplace(next_memory_, Memory{memory, reader_->register_memory(memory)});
    return next_memory_++;
}

void PartReader::unregister_memory(int index) {
    const auto found = memory_.find(index);
    if (found == memory_.end()) return;
    reader_->unregister_memory(found->second.index);
    memory_.erase(found);
}

const PartReader::Memory* PartReader::memory_of(const void* address) const {
    const auto holds = [&](const auto& entry) {
        const std::span<std::byte> bytes = entry.second.bytes;
        return address >= bytes.data() && address < bytes.data() + bytes.size();
    };
    const auto found = std::find_if(memory_.begin(), memory_.end(), holds);
    return found == memory_.end() ? nullptr : &found->second;
}

void PartReader::submit(std::vector<Read> reads) {
    std::vector<Read> parts;
    for (const Read& read : reads) split(read, parts);
    reader_->submit(std::move(parts));
}

void PartReader::split(const Read& read, std::vector<Read>& parts) {
    const uint64_t number = next_whole_++;
    const size_t before = parts.size();
    uint64_t offset_bytes = read.offset_bytes;
    for (const iovec& piece : read.pieces) {
        auto* const base = static_cast<std::byte*>(piece.iov_base);
        for (size_t done = 0; done < piece.iov_len; done += part_bytes_) {
            const Memory* memory = memory_of(base + done);
            if (memory == nullptr) break;  // a gap between cells, which nobody needs
            Read part;
            part.tag = next_part_++;
            part.file = read.file;
            part.file_index = read.file_index;
            part.buffer_index = memory->index;
            part.offset_bytes = offset_bytes + done;
            part.pieces = {{base + done, std::min(part_bytes_, piece.iov_len - done)}};
            read_bytes_ += part.pieces[0].iov_len;
            whole_of_.emplace(part.tag, number);
            parts.push_back(std::move(part));
        }
        offset_bytes += piece.iov_len;
    }
    reads_ += parts.size() - before;
    wholes_.emplace(number, Whole{{read.tag, 0}, parts.size() - before});
}

void PartReader::take() {
    parts_.clear();
    reader_->reap(parts_);
    for (const Completion& part : parts_) {
        const auto found = wholes_.find(whole_of_.extract(part.tag).mapped());
        Whole& whole = found->second;
        if (part.error != 0) whole.completion.error = part.error;
        whole.completion.took = std::max(whole.completion.took, part.took);
        if (--whole.parts_left > 0) continue;
        done_.push_back(whole.completion);
        wholes_.erase(found);
    }
}

void PartReader::reap(std::vector<Completion>& completions) {
    take();
    completions.insert(completions.end(), done_.begin(), done_.end());
    done_.clear();
}

void PartReader::wait() {
    while (done_.empty()) {
        reader_->wait();
        take();
    }
}

}  // namespace weightd
