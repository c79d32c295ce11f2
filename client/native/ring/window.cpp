#include "ring/window.h"

#include <algorithm>
#include <stdexcept>

namespace flashclient {
namespace {

constexpr uint32_t ROWS_MAX = 16;  // of a step: bits of a row mask

}  // namespace

Window::Window(uint32_t tokens, uint32_t bundles_per_cell, std::vector<uint32_t> cells)
    : tokens_(tokens), bundles_per_cell_(bundles_per_cell) {
    for (const uint32_t count : cells) {
        layers_.push_back({{}, std::vector<uint16_t>(count), std::vector<uint8_t>(count)});
    }
}

const Window::Slide& Window::slide(uint32_t layer_index, const Wanted& wanted, uint32_t limit) {
    Layer& layer = layers_.at(layer_index);
    if (wanted.columns == 0 || wanted.columns > ROWS_MAX || wanted.positions.size() != wanted.row_masks.size()) {
        throw std::invalid_argument("a step has 1 to 16 columns, and a row mask for each position");
    }
    for (const uint32_t position : wanted.positions) static_cast<void>(layer.held.at(position / bundles_per_cell_));
    slide_ = {};
    slides_++;
    // The last tokens_ tokens end with the first column, which is never rejected.
    std::erase_if(layer.tokens, [&](Token& token) {
        const bool stays = token.index < wanted.past_tokens && token.index + tokens_ > wanted.past_tokens;
        if (!stays) forget(layer, token);
        return !stays;
    });
    take_in(layer, wanted);
    release_unused(layer, slide_.release);
    while (held_ > limit && slide_.fits) slide_.fits = drop_oldest(layer_index);
    if (!slide_.fits) clear();
    return slide_;
}

void Window::forget(Layer& layer, Token& token) {
    for (const uint32_t cell : token.cells) layer.users[cell]--;
    forgotten_.insert(forgotten_.end(), token.cells.begin(), token.cells.end());
}

void Window::take_in(Layer& layer, const Wanted& wanted) {
    for (uint32_t column = 0; column < wanted.columns; column++) take_column(layer, wanted, column);
}

void Window::take_column(Layer& layer, const Wanted& wanted, uint32_t column) {
    uint16_t rows = 0;
    for (uint32_t row = column; row < ROWS_MAX; row += wanted.columns) rows |= static_cast<uint16_t>(1U << row);
    Token token{wanted.past_tokens + column, slides_, {}};
    for (size_t i = 0; i < wanted.positions.size(); i++) {
        if ((wanted.row_masks[i] & rows) == 0) continue;
        const uint32_t cell = wanted.positions[i] / bundles_per_cell_;
        if (!token.cells.empty() && token.cells.back() == cell) continue;
        token.cells.push_back(cell);
        layer.users.at(cell)++;
        if (layer.held[cell] != 0) continue;
        layer.held[cell] = 1;
        held_++;
        slide_.acquire.push_back(cell);
    }
    layer.tokens.push_back(std::move(token));
}

void Window::release_unused(Layer& layer, std::vector<uint32_t>& released) {
    for (const uint32_t cell : forgotten_) {
        if (layer.users[cell] > 0 || layer.held[cell] == 0) continue;
        layer.held[cell] = 0;
        held_--;
        released.push_back(cell);
    }
    forgotten_.clear();
}

// Of the layer whose first token is the oldest; false when there is none but those of this slide.
bool Window::drop_oldest(uint32_t current) {
    uint64_t oldest = slides_;
    size_t victim = 0;
    for (size_t i = 0; i < layers_.size(); i++) {
        if (layers_[i].tokens.empty() || layers_[i].tokens.front().slid >= oldest) continue;
        oldest = layers_[i].tokens.front().slid;
        victim = i;
    }
    if (oldest == slides_) return false;
    Layer& layer = layers_[victim];
    forget(layer, layer.tokens.front());
    layer.tokens.pop_front();
    if (victim == current) {
        release_unused(layer, slide_.release);
        return true;
    }
    auto& elsewhere = slide_.elsewhere;
    const auto index = static_cast<uint32_t>(victim);
    auto found = std::find_if(elsewhere.begin(), elsewhere.end(), [&](const auto& one) { return one.first == index; });
    if (found == elsewhere.end()) found = elsewhere.insert(found, {index, {}});
    release_unused(layer, found->second);
    return true;
}

void Window::clear() {
    for (Layer& layer : layers_) {
        for (Token& token : layer.tokens) forget(layer, token);
        layer.tokens.clear();
        std::vector<uint32_t> released;
        release_unused(layer, released);
    }
    slide_.acquire.clear();
    slide_.release.clear();
    slide_.elsewhere.clear();
}

}  // namespace flashclient
