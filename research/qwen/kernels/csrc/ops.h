// What MindSpore expects of an operator in a library: NAME does the work (inputs, then outputs, in p and shapes; 0 is
// success), NAMEInferShape gives the output shape from the input shapes.
#pragma once
#include <cstdint>
#include <vector>

namespace mindspore {
class AotExtra;
}

#define KERNEL(name) \
  extern "C" int name(int count, void** p, int* ndims, int64_t** shapes, const char**, void*, void*)
#define INFER(name) \
  extern "C" std::vector<int64_t> name##InferShape(int* ndims, int64_t** shapes, mindspore::AotExtra*)
// For more than one output.
#define INFER2(name) \
  extern "C" std::vector<std::vector<int64_t>> name##InferShape(int* ndims, int64_t** shapes, mindspore::AotExtra*)

namespace qwen {

inline std::vector<int64_t> like(int ndim, const int64_t* shape) { return {shape, shape + ndim}; }

}  // namespace qwen
