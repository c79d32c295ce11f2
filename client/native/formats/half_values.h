// The numbers of half precision in fp32, by their bits.
//
// Blocks have a scale for 32 values. Looking it up takes two loads, and converting it takes a quarter of the arithmetic
// of a block of four bits. The scales of a model are few: what is used of the table stays in the L1 cache.
#pragma once

namespace flashclient {

extern float half_values[1 << 16];  // filled before main()

}  // namespace flashclient
