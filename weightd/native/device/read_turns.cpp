#include "device/read_turns.h"

#include <algorithm>
#include <utility>

namespace weightd {

void ReadTurns::push(Read read) {
    Line& line = lines_[read.file];
    line.waiting.push_back(std::move(read));
    waiting_++;
}

void ReadTurns::push_first(Read read) {
    Line& line = lines_[read.file];
    line.waiting.push_front(std::move(read));
    waiting_++;
}

std::optional<Read> ReadTurns::next() {
    auto turn = lines_.upper_bound(last_);
    for (size_t i = 0; i < lines_.size(); i++, turn++) {
        if (turn == lines_.end()) turn = lines_.begin();
        Line& line = turn->second;
        if (line.waiting.empty() || line.under_way == of_file_max_) continue;
        Read read = std::move(line.waiting.front());
        line.waiting.pop_front();
        waiting_--;
        line.under_way++;
        last_ = turn->first;
        return read;
    }
    return std::nullopt;
}

size_t ReadTurns::startable() const {
    size_t count = 0;
    for (const auto& [file, line] : lines_) {
        count += std::min<size_t>(line.waiting.size(), of_file_max_ - line.under_way);
    }
    return count;
}

void ReadTurns::ended(const DirectFile* file) {
    const auto line = lines_.find(file);
    if (--line->second.under_way == 0 && line->second.waiting.empty()) lines_.erase(line);
}

}  // namespace weightd
