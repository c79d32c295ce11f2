// The shared-memory data plane: everything that weightd and a client exchange besides gRPC.
//
// A session is one SOCK_SEQPACKET connection, one ring (a sealed memfd) and one doorbell (an eventfd).
//   1. The client connects and sends Hello with the token from OpenSession. It receives Welcome with three or four
//      descriptors: the ring (read-write), the doorbell, the resident weights and, if there are any, the predictors
//      (read-only). The client sends nothing more over the socket; if it does, its session is closed.
//   2. The daemon sends SegmentNews with one descriptor for each pool segment, before the first grant in that segment.
//      It takes a segment back with a SegmentNews of slot_count 0; nothing in the segment is leased then.
//   3. The client writes requests and, if `daemon_sleeps` is set, rings the doorbell. The daemon answers every cell of
//      every ACQUIRE with exactly one Grant. Grants come as cells become ready, in any order.
// Indices only grow, and are taken modulo the length of their array; head == tail means empty. The daemon trusts
// nothing in the ring: it copies a request before it checks it, keeps its own copy of the indices, and closes a session
// that breaks a rule below. All numbers are little endian, the byte order of x86-64 and AArch64.
#pragma once

#include <atomic>
#include <cstdint>

namespace weightd::ring {

inline constexpr uint32_t MAGIC = 0x676e6972;  // "ring"
// Raised when the meaning of a field changes, but not for a new field that may be 0. Hello and Welcome carry it, and
// either side refuses another version.
inline constexpr uint32_t VERSION = 2;

// Bounds. The daemon must never wait for room for a grant. So a client never has more than GRANTS cells whose grants it
// has not read yet; it asks for a larger range in pieces.
inline constexpr uint32_t REQUESTS = 64;
inline constexpr uint32_t WORDS = 1024;  // of one request: cells, or borders of ranges
inline constexpr uint32_t GRANTS = 16384;
inline constexpr uint32_t TOKEN_BYTES = 16;

enum Op : uint32_t {
    ACQUIRE = 1,  // lease the cells; each gets one Grant
    RELEASE = 2,  // give back one lease of each cell; only granted leases may be given back
    // A hint: the cells may be wanted in the session's next step. They are read while the device has little else to do,
    // if there is room; they get no lease and no Grant. The hint ends when the step begins, or when the session gives
    // one with another tag.
    PREFETCH = 3,
};

enum Form : uint32_t {
    CELLS = 1,   // words are cell numbers of the layer, in any order
    RANGES = 2,  // words are pairs [begin, end) of cell numbers
};

struct Request {
    uint32_t op;
    uint32_t form;
    uint32_t layer;
    uint32_t word_count;
    uint32_t tag;            // repeated in the grants; PREFETCH: requests with the same one are one hint
    uint32_t release_count;  // ACQUIRE in form CELLS: so many of its last words are cells to give back first
    uint32_t reserved[2];
};
static_assert(sizeof(Request) == 32);

enum Status : uint32_t {
    GRANTED = 0,
    REFUSED = 1,     // the session may borrow no more now: give cells back, then ask again
    UNREADABLE = 2,  // the device failed; `slot` holds the errno
    CORRUPT = 3,     // a checksum differs; `slot` holds the bundle's index in the cell
};

struct Grant {
    uint32_t tag;
    uint32_t cell;
    uint32_t slot;     // in its segment
    uint32_t segment;  // low 24 bits: segment number; high 8 bits: Status
};
static_assert(sizeof(Grant) == 16);

inline constexpr uint32_t SEGMENT_MASK = 0x00ffffff;
inline constexpr uint32_t STATUS_SHIFT = 24;

// The daemon closes a session by setting its state, then ends its leases and hangs up the data socket. So what a client
// read from the pool is valid if the state was still OPEN afterwards. Resident weights and predictors stay mapped until
// the client hangs up as well.
enum State : uint32_t { OPEN = 0, CLOSED_BY_DAEMON = 1, CLOSED_FOR_A_BROKEN_RULE = 2 };

struct alignas(4096) Header {
    // constant after Welcome
    uint32_t magic;
    uint32_t version;

    // written by the client
    alignas(64) std::atomic<uint32_t> request_tail;
    std::atomic<uint32_t> grant_head;
    std::atomic<uint32_t> client_sleeps;  // the client waits for `bell`: the daemon must wake the futex

    // written by the daemon
    alignas(64) std::atomic<uint32_t> request_head;
    std::atomic<uint32_t> grant_tail;
    std::atomic<uint32_t> bell;           // futex: incremented after every batch of grants and change of `state`
    std::atomic<uint32_t> daemon_sleeps;  // the daemon waits in epoll: the client must ring the doorbell
    std::atomic<uint32_t> state;
    // How many cells the session may lease at once: its share and what it may borrow. It changes as sessions come and
    // go, and the client obeys it at its next ACQUIRE. Within its share a session waits for a slot. Above its share a
    // cell is GRANTED or REFUSED at once, and every cell is REFUSED while some session waits. While the daemon empties
    // a segment, the limit may be below the share. The client should then hold as few cells as it can; the daemon still
    // grants the cells of its share. A session that makes others wait for seconds and gives nothing back is closed.
    std::atomic<uint32_t> lease_limit;
    // Counters of this session. Each is written before the grants that it counts.
    std::atomic<uint64_t> hits;             // acquired cells that were in the pool, or were being read already
    std::atomic<uint64_t> misses;           // acquired cells that were not
    std::atomic<uint64_t> read_bytes;       // bytes read from flash for this session, gaps between cells included
    std::atomic<uint64_t> prefetched;       // cells that were read because of PREFETCH
    std::atomic<uint64_t> prefetched_used;  // prefetched cells that were acquired: hits
};
static_assert(std::atomic<uint64_t>::is_always_lock_free);
static_assert(std::atomic<uint32_t>::is_always_lock_free);
static_assert(sizeof(Header) == 4096);

struct Ring {
    Header header;
    Request requests[REQUESTS];
    uint32_t words[REQUESTS][WORDS];
    Grant grants[GRANTS];
};

// ---- messages of the data socket ----

struct Hello {
    uint32_t magic;
    uint32_t version;
    uint8_t token[TOKEN_BYTES];
};

struct Welcome {
    uint32_t magic;
    uint32_t version;
    uint64_t resident_bytes;     // size of resident.safetensors; the memory of its descriptor is rounded up to pages
    uint64_t calibration_bytes;  // size of predictors.safetensors, the fourth descriptor; 0: there is none
    uint32_t share_slots;
    uint32_t error;  // 0, or an errno if the token is unknown, used or expired; no descriptors come then
};

struct SegmentNews {
    uint32_t segment;
    uint32_t slot_count;  // 0: unmap it
};

}  // namespace weightd::ring
