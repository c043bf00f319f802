// As much of CUDA's runtime and driver as csrc/cuda calls, linked to it in their place: a launch goes to Python.
#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>
#include <cstring>
#include <map>
#include <string>

namespace {

struct Function {
  const char* name;
  int largest_shared = 48 * 1024;  // dynamic, as long as no attribute has raised it
};

// Not global: functions are registered before globals of other files are there.
std::map<const void*, Function>& functions() {
  static std::map<const void*, Function> all;
  return all;
}

// What tensor_memory.TensorMap unpacks.
struct TensorMap {
  char magic[8];
  std::uint64_t address, strides[4];
  std::uint32_t shape[5];
  std::uint16_t box[5], steps[5];
  std::uint8_t dtype, rank, interleave, swizzle, fill;
};

int current_device = 0, processors = 132;
int (*launch)(const char* kernel, void** arguments, const unsigned* grid, const unsigned* block,
              const unsigned* cluster, unsigned long shared) = nullptr;
std::string fault;

CUresult encode_tiled(CUtensorMap* map, CUtensorMapDataType dtype, cuuint32_t rank, void* address,
                      const cuuint64_t* shape, const cuuint64_t* strides, const cuuint32_t* box,
                      const cuuint32_t* steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                      CUtensorMapL2promotion, CUtensorMapFloatOOBfill fill) {
  static_assert(sizeof(TensorMap) <= sizeof(CUtensorMap));
  TensorMap out{};
  std::memcpy(out.magic, "tensor\0", 8);
  out.address = reinterpret_cast<std::uintptr_t>(address);
  out.dtype = dtype, out.rank = rank;
  out.interleave = interleave, out.swizzle = swizzle, out.fill = fill;
  // What the driver's documentation asks for.
  if (out.address % 16 != 0 || rank < 1 || rank > 5) return CUDA_ERROR_INVALID_VALUE;
  for (unsigned i = 0; i < rank; ++i) {
    if (shape[i] == 0 || shape[i] >= 1ull << 32 || box[i] == 0 || box[i] > 256) return CUDA_ERROR_INVALID_VALUE;
    out.shape[i] = shape[i], out.box[i] = box[i], out.steps[i] = steps[i];
    if (i == 0) continue;
    if (strides[i - 1] % 16 != 0 || strides[i - 1] >= 1ull << 40) return CUDA_ERROR_INVALID_VALUE;
    out.strides[i - 1] = strides[i - 1];
  }
  std::memcpy(map, &out, sizeof(out));
  return CUDA_SUCCESS;
}

}  // namespace

extern "C" {

#define EXPORT __attribute__((visibility("default")))
EXPORT void simulator_on_launch(decltype(launch) callback) { launch = callback; }
EXPORT void simulator_set_processors(int count) { processors = count; }
EXPORT void simulator_set_fault(const char* text) { fault = text; }

cudaError_t cudaGetDevice(int* device) {
  *device = current_device;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device > 1) return cudaErrorInvalidDevice;
  current_device = device;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  if (attribute != cudaDevAttrMultiProcessorCount) return cudaErrorNotSupported;
  *value = processors;
  return cudaSuccess;
}
const char* cudaGetErrorString(cudaError_t status) {
  if (status == cudaErrorLaunchFailure) return fault.c_str();
  return status == cudaErrorInvalidValue ? "invalid argument" : "an error of the simulated device";
}
cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** address, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  const bool found = std::strcmp(symbol, "cuTensorMapEncodeTiled") == 0;
  *address = found ? reinterpret_cast<void*>(&encode_tiled) : nullptr;
  *result = found ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t) {
  std::memset(memory, value, bytes);
  return cudaSuccess;
}

void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
void __cudaRegisterFunction(void**, const char* function, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                            int*) {
  functions()[function].name = name;
}
// Those of <<<...>>>, which nothing here calls.
cudaError_t __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) { return cudaErrorNotSupported; }
cudaError_t __cudaGetKernel(cudaKernel_t*, const void*) { return cudaErrorNotSupported; }
cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, size_t, cudaStream_t) { return cudaErrorNotSupported; }

cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value > 227 * 1024) return cudaErrorInvalidValue;
  functions().at(function).largest_shared = value;
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveClusters(int* count, const void*, const cudaLaunchConfig_t* config) {
  const auto& size = config->attrs[0].val.clusterDim;
  *count = processors / static_cast<int>(size.x * size.y * size.z);
  return cudaSuccess;
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function, void** arguments) {
  const auto found = functions().find(function);
  if (found == functions().end()) return cudaErrorInvalidDeviceFunction;
  const dim3 grid = config->gridDim, block = config->blockDim;
  if (static_cast<int>(config->dynamicSmemBytes) > found->second.largest_shared || grid.x * grid.y * grid.z == 0 ||
      block.x * block.y * block.z == 0 || block.x * block.y * block.z > 1024) {
    return cudaErrorInvalidValue;
  }
  unsigned cluster[3] = {1, 1, 1};
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = config->attrs[i];
    if (attribute.id != cudaLaunchAttributeClusterDimension) return cudaErrorNotSupported;
    const auto& size = attribute.val.clusterDim;
    cluster[0] = size.x, cluster[1] = size.y, cluster[2] = size.z;
  }
  const unsigned grid_size[3] = {grid.x, grid.y, grid.z}, block_size[3] = {block.x, block.y, block.z};
  return static_cast<cudaError_t>(
      launch(found->second.name, arguments, grid_size, block_size, cluster, config->dynamicSmemBytes));
}

}  // extern "C"
