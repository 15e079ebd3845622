// Runs kernels of a library on another processor's behalf: requests on stdin, answers on stdout, numbers in the byte
// order of both machines. Started as `driver LIBRARY`, usually under qemu; see emulated.py for the other end.
#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

namespace {

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "driver: %s\n", what);
  std::exit(3);
}

void read(void* to, size_t bytes) {
  if (bytes && std::fread(to, 1, bytes, stdin) != bytes) fail("the request ends too early");
}
void write(const void* from, size_t bytes) {
  if (bytes && std::fwrite(from, 1, bytes, stdout) != bytes) fail("the answer cannot be written");
}
template <class T>
T number() {
  T value;
  read(&value, sizeof value);
  return value;
}
std::string text() {
  std::string value(number<int32_t>(), '\0');
  read(&value[0], value.size());
  return value;
}

// An array at `offset` bytes past a multiple of 64, between guards that a kernel must leave alone.
struct Array {
  static constexpr size_t kGuard = 64;
  static constexpr uint8_t kMark = 0xa5;
  std::vector<int64_t> shape;
  std::vector<uint8_t> memory;
  uint8_t* data;
  size_t bytes;

  void receive() {
    shape.resize(number<int32_t>());
    read(shape.data(), shape.size() * sizeof(int64_t));
    bytes = number<int64_t>();
    const size_t offset = number<int32_t>();
    memory.assign(bytes + 64 + offset + 2 * kGuard, kMark);
    const auto first = reinterpret_cast<uintptr_t>(memory.data()) + kGuard;
    data = memory.data() + kGuard + (64 - first % 64) % 64 + offset;
    read(data, bytes);
  }
  bool guarded() const {
    for (const uint8_t* p = memory.data(); p < memory.data() + memory.size(); ++p)
      if ((p < data || p >= data + bytes) && *p != kMark) return false;
    return true;
  }
};

using Kernel = int (*)(int, void**, int*, int64_t**, const char**, void*, void*);

void call(void* library) {
  const std::string name = text();
  const auto kernel = reinterpret_cast<Kernel>(dlsym(library, name.c_str()));
  if (!kernel) fail(dlerror());
  std::vector<Array> arrays(number<int32_t>());
  std::vector<void*> pointers;
  std::vector<int> ranks;
  std::vector<int64_t*> shapes;
  for (Array& a : arrays) {
    a.receive();
    const auto same = number<int32_t>();  // index of the array whose memory this one is, or its own
    pointers.push_back(arrays.at(same).data);
    ranks.push_back(static_cast<int>(a.shape.size()));
    shapes.push_back(a.shape.data());
  }
  const int32_t result = kernel(static_cast<int>(arrays.size()), pointers.data(), ranks.data(), shapes.data(), nullptr,
                                nullptr, nullptr);
  write(&result, sizeof result);
  for (const Array& a : arrays) {
    if (!a.guarded()) fail((name + " has written outside an array").c_str());
  }
  for (size_t i = 0; i < arrays.size(); ++i) write(pointers[i], arrays[i].bytes);
}

void quantise(void* library) {
  using Function = int (*)(const void*, int, int64_t, int64_t, int, int64_t, int, uint8_t*, void*, uint8_t*);
  const auto function = reinterpret_cast<Function>(dlsym(library, "QwenQuantise"));
  if (!function) fail(dlerror());
  int64_t about[6];  // format, rows, columns, bits, group, zeros
  read(about, sizeof about);
  Array rows, weight, scales, points;
  for (Array* a : {&rows, &weight, &scales, &points}) a->receive();
  const int32_t faults = function(rows.data, static_cast<int>(about[0]), about[1], about[2], static_cast<int>(about[3]),
                                  about[4], static_cast<int>(about[5]), weight.data, scales.data,
                                  points.bytes ? points.data : nullptr);
  write(&faults, sizeof faults);
  for (const Array* a : {&weight, &scales, &points}) {
    if (!a->guarded()) fail("QwenQuantise has written outside an array");
    write(a->data, a->bytes);
  }
}

}  // namespace

int main(int count, char** arguments) {
  void* library = count == 2 ? dlopen(arguments[1], RTLD_NOW) : nullptr;
  if (!library) fail(count == 2 ? dlerror() : "give one library");
  const auto isa = reinterpret_cast<const char* (*)()>(dlsym(library, "QwenIsa"));
  const auto set_threads = reinterpret_cast<void (*)(int)>(dlsym(library, "QwenSetThreads"));
  const auto threads = reinterpret_cast<int (*)()>(dlsym(library, "QwenThreads"));
  if (!isa || !set_threads || !threads) fail(dlerror());
  for (int32_t request; std::fread(&request, sizeof request, 1, stdin) == 1; std::fflush(stdout)) {
    if (request == 0) {
      const std::string name = isa();
      const auto length = static_cast<int32_t>(name.size());
      write(&length, sizeof length);
      write(name.data(), name.size());
    } else if (request == 1) {
      set_threads(number<int32_t>());
      const int32_t now = threads();
      write(&now, sizeof now);
    } else if (request == 2) {
      call(library);
    } else if (request == 3) {
      quantise(library);
    } else {
      fail("unknown request");
    }
  }
  return 0;
}
