#include "pool/cell_replacement.h"

#include <algorithm>
#include <array>
#include <cassert>
#include <cmath>
#include <numbers>

namespace weightd {
namespace {

// Chosen by measurement (weightd/README.md): a longer half-life finds a little more while nothing changes, and adapts
// more slowly.
constexpr uint32_t USES_PER_HALF_LIFE = 2;  // average uses of each cell
constexpr uint32_t STEPS_PER_OCTAVE = 256;  // resolution of scores and of time
constexpr uint32_t STEPS_PER_LEVEL = 8;     // cells of one level are evicted in the order in which they entered it
constexpr uint32_t LEVELS = 1024;           // 32 octaves around now; scores beyond count as the outermost level
constexpr uint32_t NOW_FIRST = 128 * STEPS_PER_OCTAVE;
constexpr uint32_t NOW_LAST = 192 * STEPS_PER_OCTAVE;  // at this time the zero of all scores moves
constexpr uint32_t STEPS_PER_HOTNESS = STEPS_PER_OCTAVE / HOTNESS_PER_OCTAVE;
// While several scans are under way, 1/20 as many probationary cells are retained as there are cells outside the pool.
// That costs a scan up to 1/20 more reads.
constexpr uint32_t RETAINED_DIVISOR = 20;
constexpr uint32_t OCTAVES_ABOVE_NOW = 36;  // upper bound of a score above now, even if all uses are of one cell
static_assert((NOW_LAST - NOW_FIRST) % (LEVELS * STEPS_PER_LEVEL) == 0, "levels keep their lists");
static_assert(NOW_LAST + OCTAVES_ABOVE_NOW * STEPS_PER_OCTAVE <= UINT16_MAX, "scores fit into their type");

// log2(2^a + 2^b) is the larger of a and b plus sums()[their distance].
constexpr uint32_t DISTANCES = 12 * STEPS_PER_OCTAVE;  // beyond, it is less than half a step

const std::array<uint16_t, DISTANCES>& sums() {
    static const auto table = [] {
        std::array<uint16_t, DISTANCES> result{};
        for (uint32_t i = 0; i < DISTANCES; i++) {
            const double distance = static_cast<double>(i) / STEPS_PER_OCTAVE;
            result[i] = static_cast<uint16_t>(std::lround(STEPS_PER_OCTAVE * std::log2(1 + std::exp2(-distance))));
        }
        return result;
    }();
    return table;
}

uint32_t sum(uint32_t a, uint32_t b) {
    const uint32_t distance = a > b ? a - b : b - a;
    return std::max(a, b) + (distance < DISTANCES ? sums()[distance] : 0);
}

// The score, relative to now, of a cell that has been used as often as the mean for a long time.
const int MEAN_ABOVE_NOW =
    static_cast<int>(std::lround(STEPS_PER_OCTAVE * std::log2(USES_PER_HALF_LIFE / std::numbers::ln2)));

}  // namespace

CellReplacement::CellReplacement(uint32_t cells)
    : cells_(cells),
      touches_per_step_(std::max(1U, cells / (STEPS_PER_OCTAVE / USES_PER_HALF_LIFE))),
      now_(NOW_FIRST),
      lowest_(level_max()),
      scores_(cells),
      probationary_(cells),
      links_(cells + LEVELS + 1) {
    for (uint32_t i = 0; i < links_.size(); i++) links_[i] = {i, i};
}

void CellReplacement::seed(std::span<const Hotness> hotness) {
    assert(hotness.size() == cells_);
    for (uint32_t cell = 0; cell < cells_; cell++) {
        const int code = hotness[cell] & HOTNESS_MAX;
        const int above = (code - HOTNESS_MEAN) * static_cast<int>(STEPS_PER_HOTNESS) + MEAN_ABOVE_NOW;
        scores_[cell] = code > 0 ? static_cast<Score>(static_cast<int>(now_) + above) : Score{0};
        if (links_[cell].next == cell) continue;  // pinned, or not in the pool
        take(cell);
        put(cell);
    }
}

uint64_t CellReplacement::table_bytes(uint32_t cells) {
    return uint64_t{cells} * (sizeof(Score) + sizeof(uint8_t) + sizeof(Link)) + (LEVELS + 1) * sizeof(Link);
}

void CellReplacement::inserted(uint32_t cell, bool contested) {
    probationary_[cell] = contested && !admits(cell) ? 1 : 0;
    pinned(cell);
}

void CellReplacement::touched(uint32_t cell) {
    advance();
    scores_[cell] = static_cast<Score>(sum(scores_[cell], now_));
    if (links_[cell].next == cell) return;  // pinned
    take(cell);
    put(cell);
}

void CellReplacement::pinned(uint32_t cell) { take(cell); }

void CellReplacement::unpinned(uint32_t cell) { put(cell); }

void CellReplacement::removed(uint32_t cell) { take(cell); }

uint32_t CellReplacement::victim() {
    const uint32_t cell = next_victim();
    if (cell != NO_CELL) take(cell);
    return cell;
}

uint32_t CellReplacement::next_victim() {
    if (probationary_count_ > retained_max()) return links_[probationary_list()].next;
    find_lowest();
    if (lowest_ <= level_max()) return links_[list_of(lowest_)].next;
    return probationary_count_ > 0 ? links_[probationary_list()].next : NO_CELL;
}

uint32_t CellReplacement::retained_max() const {
    if (!retains_) return 0;
    const uint32_t there = admitted_count_ + probationary_count_;
    return std::min((cells_ - there) / RETAINED_DIVISOR, there / 2);
}

void CellReplacement::write_hotness(std::span<Hotness> hotness) const {
    assert(hotness.size() == cells_);
    for (uint32_t cell = 0; cell < cells_; cell++) {
        const int above = int{scores_[cell]} - static_cast<int>(now_) - MEAN_ABOVE_NOW;
        const long hot = HOTNESS_MEAN + std::lround(static_cast<double>(above) / STEPS_PER_HOTNESS);
        hotness[cell] = static_cast<Hotness>(std::clamp<long>(hot, 0, HOTNESS_MAX));
    }
}

// ---- time ----

void CellReplacement::advance() {
    if (++touches_ < touches_per_step_) return;
    touches_ = 0;
    if (++now_ % STEPS_PER_LEVEL == 0) {  // the ring of levels moves up: the lowest level joins the next one
        append(list_of(level_min()), list_of(level_min() - 1));
        lowest_ = std::max(lowest_, level_min());
    }
    if (now_ == NOW_LAST) move_zero();
}

void CellReplacement::move_zero() {
    for (Score& score : scores_) score -= std::min<Score>(score, NOW_LAST - NOW_FIRST);
    now_ = NOW_FIRST;
    lowest_ -= (NOW_LAST - NOW_FIRST) / STEPS_PER_LEVEL;
}

// ---- the ring of levels ----

uint32_t CellReplacement::level_max() const { return now_ / STEPS_PER_LEVEL + LEVELS / 2; }

uint32_t CellReplacement::level_min() const { return level_max() + 1 - LEVELS; }

uint32_t CellReplacement::level_of(Score score) const {
    return std::clamp<uint32_t>(score / STEPS_PER_LEVEL, level_min(), level_max());
}

uint32_t CellReplacement::probationary_list() const { return cells_ + LEVELS; }

uint32_t CellReplacement::list_of(uint32_t level) const { return cells_ + level % LEVELS; }

void CellReplacement::find_lowest() {
    while (lowest_ <= level_max() && links_[list_of(lowest_)].next == list_of(lowest_)) lowest_++;
}

bool CellReplacement::admits(uint32_t cell) {
    find_lowest();
    return level_of(scores_[cell]) > lowest_;
}

void CellReplacement::put(uint32_t cell) {
    uint32_t list = probationary_list();
    if (probationary_[cell] != 0) {
        probationary_count_++;
    } else {
        admitted_count_++;
        const uint32_t level = level_of(scores_[cell]);
        list = list_of(level);
        lowest_ = std::min(lowest_, level);
    }
    const uint32_t last = links_[list].previous;
    links_[cell] = {last, list};
    links_[last].next = cell;
    links_[list].previous = cell;
}

void CellReplacement::take(uint32_t cell) {
    const auto [previous, next] = links_[cell];
    if (next != cell) (probationary_[cell] != 0 ? probationary_count_ : admitted_count_)--;
    links_[previous].next = next;
    links_[next].previous = previous;
    links_[cell] = {cell, cell};
}

void CellReplacement::append(uint32_t target, uint32_t source) {
    if (links_[source].next == source) return;
    const auto [last, first] = links_[source];  // they go to the front, and are evicted first
    const uint32_t next = links_[target].next;
    links_[target].next = first;
    links_[first].previous = target;
    links_[last].next = next;
    links_[next].previous = last;
    links_[source] = {source, source};
}

}  // namespace weightd
