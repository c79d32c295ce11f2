// Want, missing, read, place, answer: the daemon's data work, without threads, sockets or a clock of its own.
//
// Belongs to one thread. Invariants: every cell asked for is answered once, by granted() or failed(); a granted cell
// stays in its slot until its last lease is given back. The lease limits of all sessions (their shares, and equal parts
// of what is lent above them) fit into --dram together. Within its share a session waits for a slot, and gets it as
// soon as those above their limits give back. Above its share it never waits: it gets a slot at once, and only while
// nobody waits, or is refused. So no session that waits for a slot is waited for, but for one whose reads are put off a
// while (engine_scans.cpp).
#pragma once

#include <algorithm>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

#include "bundle/model.h"
#include "engine/loader.h"
#include "engine/resident.h"
#include "engine/session.h"
#include "engine/user.h"
#include "pool/memory.h"

namespace weightd {

inline constexpr uint64_t SEGMENT_BYTES_MAX = 64U << 20;  // a larger one stalls the loop while it is registered
inline constexpr uint32_t SHARE_SLOTS_MIN = 2;            // one in use, one on its way
inline constexpr uint32_t FETCH_SLOTS_MAX = 256;          // share of the gRPC fetches of a model together
inline constexpr uint32_t LENT_NEVER_DIVISOR = 16;        // this part of the pool (or FETCH_SLOTS_MAX) is not lent
inline constexpr uint32_t PRESS_DIVISOR = 8;    // a press takes this part of --dram, or a segment: ten seconds to half
inline constexpr uint32_t RELIEF_DIVISOR = 32;  // a relief gives back this part
inline constexpr uint32_t IDLE_REBALANCES_MIN = 10;  // of rebalance(): a remote client may come back between tokens
inline constexpr uint32_t SESSIONS_RESERVED = 4;     // whose tables are set aside when a model is activated
inline constexpr std::chrono::seconds SCANS_WAIT_MAX{1};  // for those behind; devices read 1 to 7 GB meanwhile
inline constexpr uint64_t WARM_BYTES_MAX = 256U << 10;    // in flight: what a session reads waits for no more than that
inline constexpr uint32_t WARM_EXAMINED_MAX = 1U << 14;   // at cells, in one step
inline constexpr double BUSIER_MIN = 2;                   // times the uses of a byte: worth moving memory for
inline constexpr uint32_t WARM_HOTNESS_STEP = 2;          // a quarter of an octave: within it, in the order on flash

struct NoRoom : std::runtime_error {  // --dram cannot give what was asked; says the numbers
    using std::runtime_error::runtime_error;
};

// What a model is activated for. Each needs what the one before needs, and more.
enum class Use {
    resident,  // its resident weights are read
    cells,     // cells are fetched: a share of the pool
    session,   // a share, and predictors, if there are any
};

// Counted since the daemon's start. proto's ModelStats has a field of the same name for each, and says what it means.
struct ModelCounts {
    uint64_t hits = 0;
    uint64_t misses = 0;
    uint64_t reads = 0;
    uint64_t read_bytes = 0;
    uint64_t verify_errors = 0;
    uint64_t read_errors = 0;
    uint64_t evictions = 0;  // by pools that no longer exist

    template <typename Visit>
    void each_field(Visit visit) const {
        visit("hits", hits);
        visit("misses", misses);
        visit("reads", reads);
        visit("read_bytes", read_bytes);
        visit("verify_errors", verify_errors);
        visit("read_errors", read_errors);
        visit("evictions", evictions);
    }
};

struct Model {
    uint32_t index = 0;  // in the engine
    ModelSpec spec;
    std::unique_ptr<DirectFile> file;
    int file_index = -1;
    ModelCounts counts;
    std::optional<PredictorsFile> predictors_file;  // of the newest calibration
    std::vector<Hotness> hotness;                   // by cell, as it was when the model was activated

    // while active
    std::unique_ptr<Pool> pool;
    SharedMemory resident;
    bool resident_ready = false;
    std::shared_ptr<const Predictors> predictors;  // what the next session gets; a session keeps its own
    uint32_t users = 0;             // sessions, fetches and opens under way: an active model without any may go
    uint32_t idle_rebalances = 0;   // that found it without users, one after another
    uint32_t sessions = 0;          // opened, fetches apart
    uint32_t scans = 0;             // of those, sessions that run through the layers, as in exact mode
    uint64_t guaranteed_slots = 0;  // shares of all its sessions
    uint64_t fetching_slots = 0;    // of those, of sessions that do not borrow
    struct Stalled {
        uint32_t session;
        uint32_t cell;
        uint32_t tag;
    };
    std::deque<Stalled> stalled;   // wants for which no slot was free, in order
    std::vector<Missing> missing;  // placed, not yet submitted
    struct Deferred {
        uint32_t session;
        Missing missing;
    };
    std::vector<Deferred> deferred;  // placed, wanted by scans; what of it is submitted next is chosen then
    struct Patience {                // how long its scans may be put off
        Clock::duration left = SCANS_WAIT_MAX;
        Clock::time_point noted_at;
        bool used = false;  // something has been put off since then
    } patience;
    struct Warming {           // what is hot is read in the background, into slots that are free
        bool begun = false;    // when the first session was opened: it has its resident weights by then
        uint32_t hotness = 0;  // of the cells now looked for, and a little less; 0: nothing more
        uint32_t next_cell = 0;
    } warming;
    struct Demand {         // as of the last rebalance()
        uint64_t uses = 0;  // of cells, since the start
        uint64_t evictions = 0;
        double aged_uses = 0;  // recent ones count for more
        bool lacks = false;    // has evicted since the look before
    } demand;
};

// Opens the model's files, off the loop: that may take as long as the device likes. Throws std::system_error,
// std::invalid_argument.
std::unique_ptr<Model> open_model(ModelSpec spec, bool allow_buffered);

class Engine {
  public:
    // `warms`: a model's hot cells are read when its first session is opened, while nobody else reads.
    Engine(uint64_t dram_bytes, Reader& reader, Verifier& verifier, bool warms = true);
    ~Engine();

    // Takes in the model, whose checksums and record of what is hot --dram pays for, as activate() takes memory. Its
    // index; none, and `opened` is still the caller's: ask again soon, or stop_waiting(). Throws NoRoom.
    std::optional<uint32_t> add_model(std::unique_ptr<Model>& opened);
    uint32_t add_model(ModelSpec spec, bool allow_buffered) {  // where nothing needs to drain for it
        auto opened = open_model(std::move(spec), allow_buffered);
        return add_model(opened).value();
    }
    Model& model(uint32_t index) { return *models_.at(index); }
    const std::vector<std::unique_ptr<Model>>& models() const { return models_; }
    const Memory& memory() const { return memory_; }
    // Of each cell: what is foretold of a model, and what is known of it by now.
    void seed(uint32_t model, std::span<const Hotness> hotness);
    std::vector<Hotness> hotness(uint32_t model) const;

    // Sets aside memory for the model's resident weights and tables and for one more user, taking it from idle models
    // and from surplus segments. False: those are draining, ask again soon, or stop_waiting(); what becomes free is
    // kept for it meanwhile. Throws NoRoom, and then has changed nothing, when that and the rest of what the user needs
    // cannot be had, whatever is taken back. leave() ends the use.
    // `has_bytes`: what the user has of --dram by other sessions (user.h).
    bool activate(uint32_t model, Use use = Use::session, uint64_t has_bytes = 0);
    void stop_waiting(const Model& state) { kept_bytes_.erase(&state); }
    void leave(uint32_t model);
    // Sets memory aside for predictors, until the last user lets go of them. None: draining, ask again. Throws NoRoom.
    std::shared_ptr<Predictors> reserve_predictors(uint32_t model, const PredictorsFile& wanted);
    // What a session that wants this many slots (0: no preference) would get. Throws NoRoom.
    uint32_t share_for(uint32_t model, uint32_t slots_wanted, uint64_t has_bytes = 0) const;
    Session& open(std::unique_ptr<Session> session);  // of a model that its opener has activated
    void close(uint32_t session);
    Session* find(uint32_t session) const;

    // Requests of a session. Cells are numbered within `layer`; false: the session broke a rule and must be closed.
    bool acquire(Session& session, uint32_t layer, std::span<const uint32_t> cells, uint32_t tag);
    bool release(Session& session, uint32_t layer, std::span<const uint32_t> cells);
    bool prefetch(Session& session, uint32_t layer, std::span<const uint32_t> cells);

    // Takes in what was read, starts what is missing, flushes the sessions that were answered.
    // True when anything happened.
    bool step();
    bool reading() const { return loader_.busy(); }
    bool defers_reads() const;  // reads of scans, for a while: step() must be called then, if nothing happens, too
    void tell_time(Clock::time_point now) { now_ = now; }
    const DeviceUse& device_use(uint32_t model) const { return loader_.device_use(model); }
    ReadQueue read_queue() const { return reader_.queue(); }
    uint64_t evictions(const Model& state) const;  // since the start, by all its pools
    // Whether somebody cannot go on before others give back: wants that lack a slot, memory that another model needs.
    bool waiting() const;
    // Whether it is this session that must: it is above its limit, or leases what drains.
    bool blocks_others(const Session& session) const;

    // Memory pressure: a press takes from the pool, down to the floor or to what is guaranteed, a relief gives back a
    // part of it. Shares and leases stay whole: what is lent falls first, and segments go as leases do.
    // --dram from now on, unless it is more already.
    void raise_dram(uint64_t dram_bytes, uint64_t floor_bytes);
    void set_floor(uint64_t floor_bytes) { floor_bytes_ = std::min(floor_bytes, memory_.limit_bytes()); }
    void press();
    void relieve();
    bool pressed() const { return target_bytes_ < memory_.limit_bytes(); }
    uint64_t target_bytes() const { return target_bytes_; }  // what --dram is now
    uint64_t floor_bytes() const { return floor_bytes_; }

    // About once a second. An idle model is let go for a busy one only after a while, and a busy model that lacks slots
    // gets a segment that another uses much less.
    void rebalance();
    void end() { ending_ = true; }  // what clients map stays: they read it until there is another weightd

    static uint64_t minimum_dram_bytes(const ModelSpec& spec);
    static uint64_t session_bytes(const ModelSpec& spec);  // of the tables of one

  private:
    bool names_cells(const Session& session, uint32_t layer, std::span<const uint32_t> cells) const;
    void note_scan(Model& state, Session& session, uint32_t layer, std::span<const uint32_t> cells);
    void set_scans(Model& state, Session& session, bool scans);
    struct Laggard {  // of the scans of a model that are not resting
        uint32_t session = 0;
        uint32_t cell = 0;
        uint32_t to_first = 0;  // how far the first of them is ahead
    };
    Laggard laggard(const Model& state) const;
    static bool is_ahead(const Model& state, const Laggard& last, const Model::Deferred& wanted);
    bool has_patience(Model& state) const;
    void choose_for_scans(Model& state);
    bool within_share(const Session& session, uint32_t cell) const;
    bool borrow(Model& state, Session& session, uint32_t cell, uint32_t tag);
    void want(Model& state, Session& session, uint32_t cell, uint32_t tag);
    bool serve(Model& state, Session& session, uint32_t cell, uint32_t tag);
    void grant(Model& state, Session& session, uint32_t cell, uint32_t tag, Place place);
    void fail(Model& state, Session& session, uint32_t cell, uint32_t tag, const Loaded& loaded);
    void give_back(Model& state, Session& session, uint32_t cell, uint16_t Hold::*count);
    void wait_for(Place place, uint32_t session, uint32_t tag);
    Place place_for(Model& state, uint32_t cell);
    bool grow(Model& state);
    void take_in(const Loaded& loaded);
    void serve_stalled(Model& state);
    bool submit(Model& state);
    void start_warming(Model& state);
    bool warm(Model& state);
    void find_hot(Model& state);
    void retire(Model& state);
    void drop_segment(Model& state, std::unique_ptr<Segment> segment);
    bool make_room(const Model& state, uint64_t bytes);
    void require_room(const Model& state, uint64_t model_bytes, uint64_t user_bytes, uint64_t has_bytes) const;
    NoRoom no_room(const Model& state, uint64_t bytes, uint64_t left_bytes, uint64_t has_bytes) const;
    uint64_t kept_for_others_bytes(const Model& state) const;
    uint64_t free_bytes(const Model& state) const;
    uint64_t fixed_bytes(const Model& state) const;
    bool deactivate_idle(const Model* except, uint32_t rebalances_min);
    bool drain_surplus(const Model* asks, bool own);
    void note_demand(Model& state);
    double uses_per_byte(const Model& state) const;
    bool can_spare_segment(const Model& state) const;
    void share_by_demand();
    void deactivate(Model& state);
    uint64_t pool_bytes_free(const Model& state) const;
    uint64_t lendable_bytes() const;
    void update_limits();
    bool shrink_to_target();
    uint64_t growth_bytes(const Model& state) const;
    void claim_slots(Model& state);
    struct Waiter {
        uint32_t session;
        uint32_t tag;
        uint32_t next;
    };

    Clock::time_point now_;
    Memory memory_;
    Reader& reader_;
    Loader loader_;
    bool warms_;
    uint64_t segment_bytes_;
    uint64_t target_bytes_;  // of all memory in use; above it only what is guaranteed
    uint64_t floor_bytes_;   // of the target
    uint32_t next_segment_ = 0;
    uint32_t next_session_ = 1;
    std::vector<std::unique_ptr<Model>> models_;
    std::unordered_map<uint32_t, std::unique_ptr<Session>> sessions_;  // by id
    // By model whose opener waits: what is freed is not for growing pools.
    std::map<const Model*, uint64_t> kept_bytes_;
    struct Promise {  // what share_by_demand() freed is for the pool that lacks it to grow, until the next rebalance()
        uint32_t model = 0;
        uint64_t bytes = 0;
    } promise_;
    std::vector<Waiter> waiters_;
    uint32_t free_waiter_ = NO_WAITER;
    std::vector<uint32_t> answered_;  // sessions to flush
    std::vector<Loaded> loaded_;
    bool ending_ = false;
};

}  // namespace weightd
