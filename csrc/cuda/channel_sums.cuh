// Some neighboring channels of a token, and weighted sums of them, for a thread of the group action.
#pragma once

#include "cuda/device.h"

namespace ser_fast::cuda {

// Neighboring channels, loaded and stored at once.
template <typename T, int N>
struct alignas(sizeof(T) * N) Pack {
  T at[N];
};

template <typename T, int N>
__device__ void store(T* to, const Pack<T, N>& values) {
  if constexpr (sizeof(values) == 16) {
    store_16(to, &values);
  } else {
    *reinterpret_cast<Pack<T, N>*>(to) = values;
  }
}

template <typename Real, int N>
struct ChannelSum {
  static constexpr int kPart = N * sizeof(Real) > 16 ? 16 / sizeof(Real) : N;  // 16 bytes at a time
  using Part = Pack<Real, kPart>;

  Real at[N] = {};

  template <typename T>
  __device__ void add(Real weight, const Pack<T, N>& x) {
    for (int i = 0; i < N; ++i) at[i] += weight * widen(x.at[i]);
  }
  __device__ void add(Real weight, const ChannelSum& x) {
    for (int i = 0; i < N; ++i) at[i] += weight * x.at[i];
  }
  template <typename T>
  __device__ Pack<T, N> rounded() const {
    Pack<T, N> out;
    for (int i = 0; i < N; ++i) narrow(out.at[i], at[i]);
    return out;
  }
  // In a row of the sums of `lanes` threads; neighbors' parts are neighbors.
  __device__ void store(Part* row, int lane, int lanes) const {
    for (int part = 0; part < N / kPart; ++part) {
      Part values;
      for (int i = 0; i < kPart; ++i) values.at[i] = at[part * kPart + i];
      row[part * lanes + lane] = values;
    }
  }
  __device__ static ChannelSum load(const Part* row, int lane, int lanes) {
    ChannelSum sum;
    for (int part = 0; part < N / kPart; ++part) {
      const Part values = row[part * lanes + lane];
      for (int i = 0; i < kPart; ++i) sum.at[part * kPart + i] = values.at[i];
    }
    return sum;
  }
};

// The cells (row, column) of a table with `columns`, from one on and then every `stride`th, without a division each.
struct Cell {
  int row, column, columns, down, across;

  __device__ Cell(int first, int columns, int stride)
      : row(first / columns),
        column(first % columns),
        columns(columns),
        down(stride / columns),
        across(stride % columns) {}
  __device__ void next() {
    row += down;
    column += across;
    if (column >= columns) {
      column -= columns;
      ++row;
    }
  }
};

}  // namespace ser_fast::cuda
