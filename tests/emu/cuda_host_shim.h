// Runs simple CUDA C++ kernels on the CPU, for correctness tests only. Include it before a .cuh.
//
// A CUDA thread is a fiber; blocks run one after another. Fibers change only at __syncthreads and at warp shuffles.
// Forward and backward order run one warp as far as it gets before the next one, the greatest distance that barriers
// allow; random order mixes. A missing barrier then shows as a wrong result, most often one that depends on the order;
// a barrier or shuffle that some threads never reach as a deadlock report. What it cannot show: races between two
// instructions of one warp, speed, occupancy.
//
// Covered: 1-D grids and blocks, static shared memory, __syncthreads, __syncthreads_and, __syncwarp, __shfl_*_sync, the
// float types.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include <cuda_bf16.h>  // the host versions of the types
#include <cuda_fp16.h>

#undef __shared__
#undef __global__
#undef __device__
#undef __host__
#undef __forceinline__
#undef __launch_bounds__
#define __shared__ static  // one block at a time, so one copy is the block's
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

namespace emu {

constexpr unsigned kWarpSize = 32;
constexpr size_t kStackBytes = 64 << 10;

enum class Order : int { forward = 0, backward = 1, random = 2 };
enum class State { ready, at_block_barrier, in_shuffle, done };

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

struct Thread {
  ucontext_t start;  // how it is entered the first time; a change of context asks the kernel for the signal mask
  jmp_buf at;        // where it waits: a jump asks for nothing, and is what most changes are
  bool entered = false;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  State state = State::ready;
  unsigned mask = 0, source = 0;  // of the shuffle it waits in: lanes that take part, lane it reads
  alignas(16) unsigned char sent[16], received[16];
  bool vote = false;
};

struct Block {
  std::vector<Thread> threads;
  jmp_buf scheduler;
  unsigned current = 0;
  std::function<void()> kernel;
  std::exception_ptr failure;
};

inline Block* block = nullptr;
inline Index thread_index, block_index, block_size, grid_size;

[[noreturn]] inline void fail(const std::string& what) {
  throw std::runtime_error("block " + std::to_string(block_index.x) + ": " + what);
}

// ---- inside a fiber ------------------------------------------------------------------------------------------------

inline void wait(State state) {
  Thread& self = block->threads[block->current];
  self.state = state;
  if (_setjmp(self.at) == 0) _longjmp(block->scheduler, 1);
}

inline void run_thread() {
  for (;;) {  // a block after another
    try {
      block->kernel();
    } catch (...) {  // an exception may not leave its fiber
      block->failure = std::current_exception();
    }
    wait(State::done);
  }
}

template <typename T>
T shuffle(unsigned mask, T value, unsigned source) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "__shfl_sync takes 4 or 8 bytes");
  Thread& self = block->threads[block->current];
  if (!(mask >> (block->current % kWarpSize) & 1)) fail("a lane calls a shuffle whose mask leaves it out");
  self.mask = mask;
  self.source = source;
  std::memcpy(self.sent, &value, sizeof value);
  wait(State::in_shuffle);
  std::memcpy(&value, self.received, sizeof value);
  return value;
}

// ---- the scheduler -------------------------------------------------------------------------------------------------

inline void resume(unsigned i) {
  block->current = i;
  thread_index = {i, 0, 0};
  Thread& t = block->threads[i];
  if (_setjmp(block->scheduler) == 0) {
    if (t.entered) _longjmp(t.at, 1);
    t.entered = true;
    setcontext(&t.start);
  }
  if (block->failure) std::rethrow_exception(block->failure);
}

// Lets a shuffle happen once every lane that its mask names has arrived. True if one did.
inline bool release_shuffles(unsigned warp) {
  const unsigned first = warp * kWarpSize;
  const unsigned lanes = std::min<size_t>(kWarpSize, block->threads.size() - first);
  Thread* lane = &block->threads[first];
  bool released = false;
  for (unsigned i = 0; i < lanes; ++i) {
    if (lane[i].state != State::in_shuffle) continue;
    const unsigned mask = lane[i].mask;
    unsigned arrived = 0;
    for (unsigned k = 0; k < lanes; ++k)
      if (lane[k].state == State::in_shuffle && lane[k].mask == mask) arrived |= 1u << k;
    if (arrived != mask) continue;
    for (unsigned k = 0; k < lanes; ++k) {
      if (!(mask >> k & 1)) continue;
      if (!(mask >> lane[k].source & 1)) fail("a lane reads from a lane that takes no part in the shuffle");
      std::memcpy(lane[k].received, lane[lane[k].source].sent, sizeof lane[k].received);
    }
    for (unsigned k = 0; k < lanes; ++k)
      if (mask >> k & 1) lane[k].state = State::ready;
    released = true;
  }
  return released;
}

inline bool release_barrier() {
  bool any = false;
  for (const Thread& t : block->threads) {
    if (t.state == State::at_block_barrier) any = true;
    else if (t.state != State::done) return false;
  }
  for (const Thread& t : block->threads)
    if (any && t.state == State::done) fail("__syncthreads after a thread has left the kernel");
  for (Thread& t : block->threads) t.state = State::ready;
  return any;
}

inline void report_deadlock() {
  std::string where = "deadlock:";
  for (size_t i = 0; i < block->threads.size() && where.size() < 300; ++i) {
    const State state = block->threads[i].state;
    const char* at = state == State::at_block_barrier ? "@barrier" : state == State::in_shuffle ? "@shuffle" : "@end";
    where += " " + std::to_string(i) + at;
  }
  fail(where);
}

inline void order_turns(std::vector<unsigned>& turn, Order order, std::mt19937& random) {
  for (unsigned i = 0; i < turn.size(); ++i) turn[i] = order == Order::backward ? turn.size() - 1 - i : i;
  if (order == Order::random) std::shuffle(turn.begin(), turn.end(), random);
}

// Every ready lane of a warp runs up to its next barrier or shuffle. False if the warp is stuck.
inline bool step_warp(unsigned warp, Order order, std::mt19937& random) {
  const unsigned first = warp * kWarpSize;
  std::vector<unsigned> turn(std::min<size_t>(kWarpSize, block->threads.size() - first));
  order_turns(turn, order, random);
  bool moved = false;
  for (unsigned lane : turn)
    if (block->threads[first + lane].state == State::ready) resume(first + lane), moved = true;
  return release_shuffles(warp) || moved;
}

inline void run_block(Order order, std::mt19937& random) {
  Block& b = *block;
  for (Thread& t : b.threads) t.state = State::ready;
  std::vector<unsigned> turn((b.threads.size() + kWarpSize - 1) / kWarpSize);
  for (;;) {
    order_turns(turn, order, random);
    bool moved = false;
    for (unsigned warp : turn) {
      const unsigned steps = order == Order::random ? 1 + random() % 32 : ~0u;
      for (unsigned i = 0; i < steps && step_warp(warp, order, random); ++i) moved = true;
    }
    if (std::all_of(b.threads.begin(), b.threads.end(), [](const Thread& t) { return t.state == State::done; })) return;
    if (!moved && !release_barrier()) report_deadlock();
  }
}

// The kernel<<<blocks, threads>>>(...) of a test. Throws std::runtime_error with a report.
inline void launch(unsigned blocks, unsigned threads, Order order, unsigned seed, std::function<void()> kernel) {
  Block b;
  b.threads = std::vector<Thread>(threads);
  for (Thread& t : b.threads) {
    getcontext(&t.start);
    t.start.uc_stack.ss_sp = t.stack.get();
    t.start.uc_stack.ss_size = kStackBytes;
    t.start.uc_link = nullptr;
    makecontext(&t.start, run_thread, 0);
  }
  b.kernel = std::move(kernel);
  block = &b;
  block_size = {threads, 1, 1};
  grid_size = {blocks, 1, 1};
  std::mt19937 random(seed);
  std::vector<unsigned> turn(blocks);  // the blocks of a grid have no order either
  order_turns(turn, order, random);
  for (unsigned i : turn) {
    block_index = {i, 0, 0};
    run_block(order, random);
  }
}

}  // namespace emu

// ---- what a kernel sees --------------------------------------------------------------------------------------------

#define threadIdx emu::thread_index
#define blockIdx emu::block_index
#define blockDim emu::block_size
#define gridDim emu::grid_size

inline void __syncthreads() { emu::wait(emu::State::at_block_barrier); }

inline int __syncthreads_and(int vote) {
  emu::block->threads[emu::block->current].vote = vote != 0;
  __syncthreads();
  bool all = true;
  for (const emu::Thread& thread : emu::block->threads) all = all && thread.vote;
  __syncthreads();  // before another vote
  return all;
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int source) {
  return emu::shuffle(mask, value, static_cast<unsigned>(source) % emu::kWarpSize);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  return emu::shuffle(mask, value, threadIdx.x % emu::kWarpSize ^ static_cast<unsigned>(lanes));
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned lanes) {
  const unsigned lane = threadIdx.x % emu::kWarpSize;
  return emu::shuffle(mask, value, lane < lanes ? lane : lane - lanes);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned lanes) {
  const unsigned lane = threadIdx.x % emu::kWarpSize;
  return emu::shuffle(mask, value, lane + lanes < emu::kWarpSize ? lane + lanes : lane);
}
inline void __syncwarp(unsigned mask = 0xffffffffu) { emu::shuffle(mask, 0, threadIdx.x % emu::kWarpSize); }
