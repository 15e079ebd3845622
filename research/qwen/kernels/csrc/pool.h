// A small pool of threads: the caller works too, idle threads spin briefly between the operators of one step and then
// sleep, so nothing runs between steps.
#pragma once
#include <cstddef>
#include <cstdint>

namespace qwen {

void set_threads(int count);  // 1 until it is called
int threads();

// A buffer of the calling thread, 64-byte aligned, kept for its next call; null when memory runs out.
float* thread_scratch(int64_t floats);
// The same for the one job that runs at a time, shared by its threads; only inside a Turn.
float* shared_scratch(int64_t floats);

// While a Turn lives no other operator uses the pool (MindSpore may launch independent operators side by side).
class Turn {
 public:
  Turn();
  ~Turn();
  Turn(const Turn&) = delete;
  Turn& operator=(const Turn&) = delete;
};

using Job = void (*)(void* context, int64_t begin, int64_t end);
// Calls job on pieces of [0, count), each at most `piece` long, on all threads; inside a Turn. A thread's pieces follow
// one another, so small pieces cost little and still read memory as one stream.
void run_pieces(int64_t count, int64_t piece, Job job, void* context);

template <class F>
void parallel(int64_t count, int64_t piece, F&& body) {
  run_pieces(count, piece, [](void* f, int64_t begin, int64_t end) { (*static_cast<F*>(f))(begin, end); }, &body);
}

}  // namespace qwen
