// Intermediate values of the one operator that runs at a time.
#pragma once
#include <cstdint>
#include <cstdlib>

namespace qwen {

// Grown as needed and kept for the next use. Inside a Turn.
class Arena {
 public:
  bool reserve(int64_t bytes) {
    used_ = 0;
    if (bytes <= size_) return true;
    std::free(data_);
    data_ = static_cast<char*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64));
    size_ = data_ ? bytes : 0;
    return data_ != nullptr;
  }
  template <class T>
  T* take(int64_t count) {
    T* const at = reinterpret_cast<T*>(data_ + used_);
    used_ += bytes<T>(count);
    return at;
  }
  template <class T>
  static int64_t bytes(int64_t count) {
    return (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
  }

 private:
  char* data_ = nullptr;
  int64_t size_ = 0, used_ = 0;
};

}  // namespace qwen
