#pragma once

#include <cstdint>
#include <functional>

namespace ser_fast {

// Runs body(begin, end) over parts of [0, count), in any order and on any number of threads.
using ParallelFor = std::function<void(int64_t count, const std::function<void(int64_t, int64_t)>& body)>;

}  // namespace ser_fast
