// Threads that take turns at pieces of matrices.
//
// Rows come sorted by group, each group with a matrix [n k] of its own: the experts of a mixture. One group is a plain product.
// An output is summed by one thread in an order that its shape fixes, so that results do not depend on the threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>
#include <utility>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

// Pieces of all groups' matrices, which threads take one by one. Lives until the last thread has let go of it: one that
// comes when all is done finds nothing and touches no array. `product(start, m, group, begin, end)` multiplies rows
// start .. start + m with rows begin .. end of a group's matrix.
template <typename Product>
struct Work {
  Product product;
  const int32_t* sizes;
  int64_t n, width, pieces, total;  // width: matrix rows of a piece; pieces of each matrix, and of all
  std::atomic<int64_t> next{0}, done{0};

  void run() {
    for (int64_t piece; (piece = next.fetch_add(1)) < total; done.fetch_add(1, std::memory_order_release)) {
      int64_t group = piece / pieces, begin = piece % pieces * width, start = 0;
      for (int64_t g = 0; g < group; ++g) start += sizes[g];
      if (sizes[group] > 0) product(start, sizes[group], group, begin, std::min(n, begin + width));
    }
  }
};

// All of `product` for `out` [m n]. sizes: the rows of each group; width: matrix rows that a thread takes at a time.
template <typename Product>
ffi::Error shared_out(ffi::ThreadPool& pool, Product product, const int32_t* sizes, int64_t groups, int64_t m, int64_t n,
                      int64_t width, float* out) {
  auto work = std::make_shared<Work<Product>>();
  work->product = std::move(product);
  work->sizes = sizes;
  work->n = n;
  work->width = width;
  work->pieces = (n + width - 1) / width;
  work->total = work->pieces * groups;
  int64_t used = 0;
  for (int64_t g = 0; g < groups; ++g) used += sizes[g];
  if (used > m) return ffi::Error::InvalidArgument("group_sizes add up to more rows than there are");
  std::fill(out + used * n, out + m * n, 0.0f);  // rows of no group

  // Helpers may come late or never: this thread goes on alone, and waits only for pieces that others have begun.
  const int64_t helpers = std::min<int64_t>(pool.num_threads(), work->total) - 1;
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule([work] { work->run(); });
  work->run();
  while (work->done.load(std::memory_order_acquire) < work->total) std::this_thread::yield();
  return ffi::Error::Success();
}
