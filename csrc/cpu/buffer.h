#pragma once

#include <cstddef>
#include <new>
#include <utility>
#include <vector>

namespace ser_fast {

// Scratch memory: a vector whose new elements hold anything, and that starts with a cache line, because a vector
// register that lies in two of them takes twice as long to load.
template <typename T>
struct Uninitialized {
  using value_type = T;
  Uninitialized() = default;
  template <typename U>
  Uninitialized(const Uninitialized<U>&) {}
  T* allocate(std::size_t count) { return static_cast<T*>(::operator new(count * sizeof(T), std::align_val_t(64))); }
  void deallocate(T* at, std::size_t) { ::operator delete(at, std::align_val_t(64)); }
  template <typename U, typename... Values>
  void construct(U* at, Values&&... values) {
    if constexpr (sizeof...(Values) > 0) ::new (at) U(std::forward<Values>(values)...);
  }
  bool operator==(const Uninitialized&) const { return true; }
};
template <typename T>
using Buffer = std::vector<T, Uninitialized<T>>;

}  // namespace ser_fast
