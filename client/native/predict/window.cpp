#include "predict/window.h"

#include <algorithm>
#include <stdexcept>
#include <utility>

#include "kernels/kernels.h"

namespace flashclient {
namespace {

constexpr uint64_t ON_ITS_WAY = 1;  // no address: cells are aligned to more
constexpr uint32_t NO_CELL = UINT32_MAX;

}  // namespace

Window::Window(CellSource& source, uint32_t tokens, CellLayout layout)
    : source_(source), tokens_(tokens), layout_(std::move(layout)) {
    for (const uint32_t cells : layout_.cells) {
        layers_.push_back({{}, std::vector<uint64_t>(cells), std::vector<uint16_t>(cells)});
    }
}

bool Window::slide(uint32_t layer_index, const Wanted& wanted) {
    Layer& layer = layers_.at(layer_index);
    const uint32_t limit = source_.lease_limit();
    const bool fitting = fits(layer, wanted, limit);
    if (unfinished_ || !fitting) clear();
    if (!fitting) return false;
    unfinished_ = true;
    layer_ = layer_index;
    slide_ = {};
    dropped_.clear();
    slides_++;
    // The window ends with the first column, which is never rejected.
    std::erase_if(layer.tokens, [&](const Token& token) {
        const bool stays = token.index < wanted.past_tokens && token.index + tokens_ > wanted.past_tokens;
        if (!stays) drop(layer, token);
        return !stays;
    });
    for (uint32_t column = 0; column < wanted.columns; column++) take_in(layer, wanted, column);
    release_unused(layer, slide_.release);
    while (held_ > limit) drop_oldest(layer_index);
    release_elsewhere();
    exchange(slide_.acquire);
    return true;
}

// Cells leave slide_ before the source gets them, because the source answers for them even if it throws.
void Window::release_elsewhere() {
    auto& elsewhere = slide_.elsewhere;
    while (!elsewhere.empty()) {
        const auto [layer, cells] = std::move(elsewhere.front());
        elsewhere.erase(elsewhere.begin());
        source_.exchange(layer, {}, cells);
    }
}

void Window::exchange(const std::vector<uint32_t>& acquire) {
    const std::vector<uint32_t> release = std::exchange(slide_.release, {});
    if (!acquire.empty() || !release.empty()) source_.exchange(layer_, acquire, release);
}

// Whether the step alone fits into the limit.
bool Window::fits(const Layer& layer, const Wanted& wanted, uint32_t limit) const {
    if (wanted.columns == 0 || wanted.columns > TOKENS_MAX || wanted.positions.size() != wanted.row_masks.size()) {
        throw std::invalid_argument("a step has 1 to 16 columns, and a row mask for each position");
    }
    uint32_t cells = 0;
    uint32_t last = NO_CELL;
    for (const uint32_t position : wanted.positions) {
        const uint32_t cell = position / layout_.bundles_per_cell;
        if (cell >= layer.addresses.size()) throw std::out_of_range("a position is beyond the layer's cells");
        cells += cell != last;
        last = cell;
    }
    return cells <= limit;
}

void Window::take_in(Layer& layer, const Wanted& wanted, uint32_t column) {
    uint16_t rows = 0;
    for (uint32_t row = column; row < TOKENS_MAX; row += wanted.columns) rows |= static_cast<uint16_t>(1U << row);
    Token token{wanted.past_tokens + column, slides_, {}};
    for (size_t i = 0; i < wanted.positions.size(); i++) {
        if ((wanted.row_masks[i] & rows) == 0) continue;
        const uint32_t cell = wanted.positions[i] / layout_.bundles_per_cell;
        if (!token.cells.empty() && token.cells.back() == cell) continue;
        token.cells.push_back(cell);
        layer.users[cell]++;
        if (ask_for(layer, cell)) slide_.acquire.push_back(cell);
    }
    layer.tokens.push_back(std::move(token));
}

// False where it is leased already.
bool Window::ask_for(Layer& layer, uint32_t cell) {
    if (layer.addresses[cell] != 0) return false;
    layer.addresses[cell] = ON_ITS_WAY;
    layer.held++;
    held_++;
    return true;
}

void Window::drop(Layer& layer, const Token& token) {
    for (const uint32_t cell : token.cells) layer.users[cell]--;
    dropped_.insert(dropped_.end(), token.cells.begin(), token.cells.end());
}

void Window::release_unused(Layer& layer, std::vector<uint32_t>& released) {
    for (const uint32_t cell : dropped_) {
        if (layer.users[cell] > 0 || layer.addresses[cell] == 0) continue;
        layer.addresses[cell] = 0;
        layer.held--;
        held_--;
        released.push_back(cell);
    }
    dropped_.clear();
}

// Drops the oldest token of all layers. There is one that is older than this slide, because the step alone fits.
void Window::drop_oldest(uint32_t current) {
    uint64_t oldest = slides_;
    size_t victim = 0;
    for (size_t i = 0; i < layers_.size(); i++) {
        if (layers_[i].tokens.empty() || layers_[i].tokens.front().slid >= oldest) continue;
        oldest = layers_[i].tokens.front().slid;
        victim = i;
    }
    if (oldest == slides_) throw std::logic_error("the window leases cells that no token wants");
    Layer& layer = layers_[victim];
    drop(layer, layer.tokens.front());
    layer.tokens.pop_front();
    if (victim == current) return release_unused(layer, slide_.release);
    auto& elsewhere = slide_.elsewhere;
    const auto index = static_cast<uint32_t>(victim);
    auto found = std::find_if(elsewhere.begin(), elsewhere.end(), [&](const auto& one) { return one.first == index; });
    if (found == elsewhere.end()) found = elsewhere.insert(found, {index, {}});
    release_unused(layer, found->second);
}

bool Window::wait() {
    Layer& layer = layers_[layer_];
    const std::vector<Arrival> arrivals = source_.arrived();
    if (arrivals.empty()) throw std::logic_error("the window waits for cells that are not on their way");
    bool refused = false;
    for (const auto& [cell, address] : arrivals) {
        uint64_t& entry = layer.addresses.at(cell);
        if (entry != ON_ITS_WAY) throw std::logic_error("a cell arrived that was not asked for");
        if (address <= ON_ITS_WAY) {
            refused = true;
        } else {
            entry = address;
        }
    }
    if (refused) clear();
    return !refused;
}

void Window::locate(std::span<const uint32_t> positions, std::span<uint64_t> addresses,
                    std::vector<uint32_t>& found) const {
    const std::vector<uint64_t>& table = layers_[layer_].addresses;
    for (size_t i = 0; i < positions.size(); i++) {
        if (addresses[i] != 0) continue;
        const uint64_t cell = table[positions[i] / layout_.bundles_per_cell];
        if (cell <= ON_ITS_WAY) continue;
        addresses[i] = cell + uint64_t{positions[i] % layout_.bundles_per_cell} * layout_.stride_bytes;
        found.push_back(static_cast<uint32_t>(i));
    }
}

void Window::end_step() {
    unfinished_ = false;
    if (tokens_ == 0) clear();
}

size_t Window::lease_first(uint32_t layer_index, std::span<const uint32_t> positions) {
    Layer& layer = layers_.at(layer_index);
    if (held_ > 0) throw std::logic_error("the window is not empty");
    const uint32_t share = source_.share_slots();
    unfinished_ = true;
    layer_ = layer_index;
    slide_ = {};
    size_t count = 0;
    for (; count < positions.size(); count++) {
        const uint32_t cell = positions[count] / layout_.bundles_per_cell;
        if (layer.addresses.at(cell) != 0) continue;
        if (held_ == share) break;
        static_cast<void>(ask_for(layer, cell));
        slide_.acquire.push_back(cell);
    }
    source_.exchange(layer_index, slide_.acquire, {});
    return count;
}

void Window::clear() {
    if (held_ == 0 && !unfinished_) return;
    unfinished_ = true;
    source_.cancel();
    release_elsewhere();  // of a slide() that threw
    exchange({});
    for (uint32_t index = 0; index < layers_.size(); index++) {
        Layer& layer = layers_[index];
        std::vector<uint32_t> arrived;
        for (uint32_t cell = 0; cell < layer.addresses.size() && layer.held > 0; cell++) {
            if (layer.addresses[cell] > ON_ITS_WAY) arrived.push_back(cell);
        }
        held_ -= layer.held;
        empty(layer);
        if (!arrived.empty()) source_.exchange(index, {}, arrived);
    }
    unfinished_ = false;
}

void Window::forget() {
    for (Layer& layer : layers_) empty(layer);
    slide_ = {};
    held_ = 0;
    unfinished_ = false;
}

void Window::empty(Layer& layer) {
    if (layer.held > 0) std::fill(layer.addresses.begin(), layer.addresses.end(), 0);
    for (const Token& token : layer.tokens) {
        for (const uint32_t cell : token.cells) layer.users[cell] = 0;
    }
    layer.tokens.clear();
    layer.held = 0;
}

}  // namespace flashclient
