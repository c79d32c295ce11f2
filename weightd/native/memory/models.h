// The models that are served, and how --dram is divided among them: activation, growth of pools, and giving back.
//
// Invariants: a model with users is active, and stays active. Idle models are deactivated before anything is taken
// from a model in use. Shares stay whole: only what is lent, or used by nobody, is taken back.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "memory/demand.h"
#include "memory/memory.h"
#include "memory/model.h"
#include "memory/model_cost.h"
#include "memory/pressure.h"
#include "memory/room.h"
#include "memory/segments.h"
#include "memory/sessions.h"

namespace weightd {

inline constexpr uint32_t IDLE_REBALANCES_MIN = 10;  // a remote client may come back between two tokens

// What a model is activated for. Each use needs what the one before it needs, and more.
enum class Use {
    resident,  // its resident weights are read
    cells,     // cells are fetched, or a session computes all of them: a share of the pool
    session,   // a share, and predictors if there are any
};

struct ModelRemoved : std::runtime_error {  // from the store, since its caller has found it
    explicit ModelRemoved(const std::string& model) : std::runtime_error(model + " was removed from the store") {}
};

class Models {
  public:
    Models(uint64_t dram_bytes, Reader& reader);

    // Adds a model, whose checksums and record of hot cells --dram pays for. Returns its index. None: memory is being
    // drained for it and `opened` is still the caller's: ask again soon, or call stop_waiting(). Throws NoRoom.
    std::optional<uint32_t> add(std::unique_ptr<Model>& opened);
    uint32_t add(ModelSpec spec, bool allow_buffered) {  // where nothing needs to be drained for it
        auto opened = open_model(std::move(spec), allow_buffered);
        return add(opened).value();
    }
    // Ends an idle model: gives its memory back and closes its files. False: somebody uses it, or it is being read.
    bool remove(uint32_t model);
    Model& at(uint32_t model) { return *models_.at(model); }
    const ModelList& all() const { return models_; }

    // How hot each cell is: what is known before its uses are seen, and what is known by now.
    void seed(uint32_t model, std::span<const Hotness> hotness);
    std::vector<Hotness> hotness(uint32_t model) const;

    // Sets memory aside for the model's resident weights and tables and for one more user. Takes it from idle models
    // and from surplus segments. False: those are being drained, and what becomes free is kept for this model: ask
    // again soon, or call stop_waiting(). Throws NoRoom, without any change, if this and the rest of what the user
    // needs do not fit even after all memory that can be taken back has been taken back, and ModelRemoved.
    // leave() ends the use.
    // `has_bytes`: the part of --dram that the user has by other sessions (user.h).
    bool activate(uint32_t model, Use use = Use::session, uint64_t has_bytes = 0);
    void stop_waiting(const Model& model) { room_.stop_keeping(model); }
    void leave(uint32_t model);
    void note_fetch(uint32_t model) { at(model).fetched = true; }
    // Sets memory aside for predictors, until their last user drops them. None: segments are being drained, ask again.
    // Throws NoRoom.
    std::shared_ptr<LoadedPredictors> reserve_predictors(uint32_t model, const PredictorsFile& wanted);
    // The share that a session that wants this many slots (0: no preference) would get. Throws NoRoom.
    uint32_t share_for(uint32_t model, uint32_t slots_wanted, uint64_t has_bytes = 0) const {
        return room_.share_for(*models_.at(model), slots_wanted, has_bytes);
    }

    // For the engine. A place for a cell that is not in the pool, or none when all slots are busy.
    Place place_for(Model& model, uint32_t cell);
    bool grow(Model& model) { return segments_.grow(model); }
    void retire_drained(Model& model) { segments_.retire(model); }
    void pin_populated() { segments_.pin_populated(); }
    // A session waits for a slot of its share: a surplus of another model is taken back for it.
    void claim_slots(const Model& model);
    bool openers_wait() const { return room_.keeps(); }

    // --dram and its floor from now on, unless --dram is more already.
    void raise_dram(uint64_t dram_bytes, uint64_t floor_bytes);
    // Under memory pressure a press gives memory back, down to the floor or to the shares; a relief takes a part again.
    void set_floor(uint64_t floor_bytes) { pressure_.set_floor(floor_bytes); }
    void press();
    void relieve();
    // Gives back what exceeds the target, as far as leases allow. True when something was given back.
    bool shrink_to_target();

    // Called about once a second. A busy model that lacks slots gets a segment of one that uses its segments much less.
    void rebalance();
    // From now on, keeps memory that clients still map; they use it until a new weightd starts.
    void end() { ending_ = true; }

    Sessions& sessions() { return sessions_; }
    const Sessions& sessions() const { return sessions_; }
    const Memory& memory() const { return memory_; }
    const Pressure& pressure() const { return pressure_; }

  private:
    bool make_room(const Model& asking, uint64_t bytes);
    bool deactivate_idle(const Model* except, uint32_t idle_rebalances_min);
    void deactivate(Model& model);

    Memory memory_;
    Pressure pressure_;
    ModelList models_;
    Sessions sessions_;
    Room room_;
    Segments segments_;
    Demand demand_;
    Reader& reader_;
    bool ending_ = false;
};

}  // namespace weightd
