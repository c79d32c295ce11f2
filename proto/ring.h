// The shared-memory data plane: everything that weightd and a client exchange besides gRPC.
//
// A session is one SOCK_SEQPACKET connection, one ring (a sealed memfd) and one doorbell (an eventfd).
//   1. The client connects, sends Hello with the token that OpenSession returned, and receives Welcome with three or
//      four descriptors: ring (read-write), doorbell, resident weights and, where there are any, predictors
//      (read-only). It sends nothing more: a session whose client does is closed.
//   2. Pool segments follow as SegmentNews with one descriptor each, before the first grant that names them. A
//      segment that the daemon takes back is announced by SegmentNews with slot_count 0; nothing in it is leased then.
//   3. The client writes requests and, when `daemon_sleeps` is set, rings the doorbell. The daemon answers every cell
//      of every ACQUIRE by exactly one Grant, as it becomes ready, in any order.
// Each index counts up for ever and is taken modulo its array's length; head == tail means empty. The daemon trusts
// nothing in the ring: it copies a request before it checks it, keeps its own indices apart, and closes a session that
// breaks a rule below. All numbers are little-endian, in the byte order of x86-64 and AArch64.
#pragma once

#include <atomic>
#include <cstdint>

namespace weightd::ring {

inline constexpr uint32_t MAGIC = 0x676e6972;  // "ring"
inline constexpr uint32_t VERSION = 2;  // another one where a meaning changes, not where a field is added that may be 0

// Bounds. A grant that does not fit would block the daemon, so a client never has more cells unanswered or unread
// than GRANTS; a larger range is asked for in pieces.
inline constexpr uint32_t REQUESTS = 64;
inline constexpr uint32_t WORDS = 1024;  // cells or range borders of one request
inline constexpr uint32_t GRANTS = 16384;
inline constexpr uint32_t TOKEN_BYTES = 16;

enum Op : uint32_t {
    ACQUIRE = 1,   // lease the cells: one Grant for each
    RELEASE = 2,   // give back one lease of each cell; only granted leases may be given back
    PREFETCH = 3,  // read the cells if there is room; no lease, no grant
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
    uint32_t tag;            // returned in the grants
    uint32_t release_count;  // of an ACQUIRE in form CELLS: its last words are cells that it gives back first
    uint32_t reserved[2];
};
static_assert(sizeof(Request) == 32);

enum Status : uint32_t {
    GRANTED = 0,
    REFUSED = 1,     // nothing more is lent to this session now: give something back, then ask again
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

// Set before a lease of the session ends, then the data socket hangs up. So what was read of the pool counts if the
// state was OPEN afterwards. Resident weights and predictors stay until the client hangs up, too.
enum State : uint32_t { OPEN = 0, CLOSED_BY_DAEMON = 1, CLOSED_FOR_A_BROKEN_RULE = 2 };

struct alignas(4096) Header {
    // constant after Welcome
    uint32_t magic;
    uint32_t version;

    // written by the client
    alignas(64) std::atomic<uint32_t> request_tail;
    std::atomic<uint32_t> grant_head;
    std::atomic<uint32_t> client_sleeps;  // it waits for `bell`, so the daemon must wake the futex

    // written by the daemon
    alignas(64) std::atomic<uint32_t> request_head;
    std::atomic<uint32_t> grant_tail;
    std::atomic<uint32_t> bell;           // futex: raised after every batch of grants and after `state` changes
    std::atomic<uint32_t> daemon_sleeps;  // it waits in epoll, so the client must ring the doorbell
    std::atomic<uint32_t> state;
    // Cells that may be leased at once: the share and what may be borrowed above it. It changes as sessions come and
    // go; the client obeys it at its next ACQUIRE. Within its share a session waits for a slot; above it, a cell is
    // granted or REFUSED at once, and nothing is lent while anybody waits. The limit may fall below the share for a
    // moment, while the daemon empties a segment: then it asks the client to hold as little as it can, and refuses
    // nothing more. A session that keeps others waiting for seconds, because it gives back nothing, is closed.
    std::atomic<uint32_t> lease_limit;
    // What this session has done, each written before the grants that it counts.
    std::atomic<uint64_t> hits;        // cells that it asked for and that were in the pool, or on their way
    std::atomic<uint64_t> misses;      // the others
    std::atomic<uint64_t> read_bytes;  // from flash for it, with what is read through between cells
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
    uint64_t resident_bytes;     // of resident.safetensors; the descriptor's size is rounded up to pages
    uint64_t calibration_bytes;  // of predictors.safetensors, whose descriptor is the fourth; 0: there is none
    uint32_t share_slots;
    uint32_t error;  // 0, or an errno: the token is unknown, used or expired; no descriptors then
};

struct SegmentNews {
    uint32_t segment;
    uint32_t slot_count;  // 0: unmap it
};

}  // namespace weightd::ring
