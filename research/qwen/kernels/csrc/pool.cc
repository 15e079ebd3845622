#include "pool.h"

#include <sched.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <thread>

namespace qwen {
namespace {

constexpr auto kSpin = std::chrono::microseconds(200);

void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

struct Buffer {
  float* data = nullptr;
  int64_t size = 0;
  float* get(int64_t floats) {
    if (floats > size) {
      std::free(data);
      data = static_cast<float*>(std::aligned_alloc(64, (floats * sizeof(float) + 63) / 64 * 64));
      size = data ? floats : 0;
    }
    return data;
  }
  ~Buffer() { std::free(data); }
};

// What one thread still has to do: pieces [next, end). It takes them from the front, so that it walks one contiguous
// stretch of memory; a thread that has none left takes the back half of another's.
struct alignas(64) Span {
  std::atomic<uint64_t> bits{0};  // end in the upper half

  static uint64_t pack(uint64_t next, uint64_t end) { return end << 32 | next; }

  bool take(int64_t* piece) {
    uint64_t now = bits.load(std::memory_order_relaxed);
    while (uint32_t(now) < now >> 32)
      if (bits.compare_exchange_weak(now, now + 1, std::memory_order_relaxed)) {
        *piece = uint32_t(now);
        return true;
      }
    return false;
  }

  // Moves half of the victim's pieces into this span, which is empty.
  bool steal(Span& victim) {
    uint64_t now = victim.bits.load(std::memory_order_relaxed);
    while (uint32_t(now) < now >> 32) {
      const uint64_t next = uint32_t(now), end = now >> 32, middle = next + (end - next) / 2;
      if (victim.bits.compare_exchange_weak(now, pack(next, middle), std::memory_order_relaxed)) {
        bits.store(pack(middle, end), std::memory_order_relaxed);
        return true;
      }
    }
    return false;
  }
};

// Deliberately never destroyed: workers may still sleep in it when the process ends.
struct Pool {
  static constexpr uint32_t kOpen = 1u << 31;
  static constexpr int kMost = 1024;  // threads

  std::mutex turn;                 // one job at a time
  std::mutex door;                 // guards sleeping
  std::condition_variable bell;
  std::atomic<uint64_t> round{0};  // grows with every job
  std::atomic<uint32_t> crew{0};   // kOpen while workers may join, plus the number of those inside
  int64_t count = 0, piece = 1;
  Job job = nullptr;
  void* context = nullptr;
  int sleepers = 0, started = 0, shares = 1;
  std::atomic<int> wanted{1};
  Span* spans = nullptr;           // of `shares` threads
  Buffer shared;

  void work(int self) {
    for (;;) {
      int64_t i;
      while (spans[self].take(&i)) {
        const int64_t begin = i * piece;
        job(context, begin, begin + piece < count ? begin + piece : count);
      }
      int tried = 1;
      while (tried < shares && !spans[self].steal(spans[(self + tried) % shares])) ++tried;
      if (tried >= shares) return;
    }
  }

  // A worker that wakes up too late finds the crew closed; the caller never waits for one that did not join.
  void join(int self) {
    uint32_t now = crew.load(std::memory_order_acquire);
    while (now & kOpen) {
      if (!crew.compare_exchange_weak(now, now + 1, std::memory_order_acquire)) continue;
      if (self < shares) work(self);
      crew.fetch_sub(1, std::memory_order_release);
      return;
    }
  }

  uint64_t await(uint64_t seen) {
    const auto until = std::chrono::steady_clock::now() + kSpin;
    for (int i = 1;; ++i) {
      const uint64_t now = round.load(std::memory_order_acquire);
      if (now != seen) return now;
      relax();
      if (i % 64 == 0 && std::chrono::steady_clock::now() > until) break;
    }
    std::unique_lock<std::mutex> lock(door);
    ++sleepers;
    bell.wait(lock, [&] { return round.load(std::memory_order_acquire) != seen; });
    --sleepers;
    return round.load(std::memory_order_acquire);
  }

  void loop(int index, uint64_t seen) {
    for (;;) {
      seen = await(seen);
      if (index < wanted.load(std::memory_order_relaxed)) join(index);
    }
  }

  void run(int64_t n, int64_t p, Job j, void* c) {
    if (!spans) spans = new Span[kMost];
    shares = wanted;
    while (started < shares - 1) {
      ++started;
      std::thread(&Pool::loop, this, started, round.load()).detach();
    }
    count = n, piece = p, job = j, context = c;
    while ((count + piece - 1) / piece > 0xffffffffll) piece *= 2;
    const uint64_t pieces = (count + piece - 1) / piece;
    for (uint64_t i = 0; i < uint64_t(shares); ++i)
      spans[i].bits.store(Span::pack(pieces * i / shares, pieces * (i + 1) / shares), std::memory_order_relaxed);
    crew.store(kOpen, std::memory_order_release);
    {
      std::lock_guard<std::mutex> lock(door);
      round.fetch_add(1, std::memory_order_release);
      if (sleepers) bell.notify_all();
    }
    work(0);
    crew.fetch_and(~kOpen, std::memory_order_acq_rel);
    for (int i = 0; crew.load(std::memory_order_acquire); ++i) {
      relax();
      if (i > 4096) sched_yield();
    }
  }
};

Pool& pool() {
  static Pool* const one = new Pool;
  return *one;
}

}  // namespace

void set_threads(int count) {
  std::lock_guard<std::mutex> lock(pool().turn);
  pool().wanted = count < 1 ? 1 : (count > Pool::kMost ? Pool::kMost : count);
}

int threads() { return pool().wanted; }

float* thread_scratch(int64_t floats) {
  thread_local Buffer buffer;
  return buffer.get(floats);
}

float* shared_scratch(int64_t floats) { return pool().shared.get(floats); }

Turn::Turn() { pool().turn.lock(); }
Turn::~Turn() { pool().turn.unlock(); }

void run_pieces(int64_t count, int64_t piece, Job job, void* context) {
  if (pool().wanted < 2 || count <= piece) return job(context, 0, count);
  pool().run(count, piece, job, context);
}

}  // namespace qwen
