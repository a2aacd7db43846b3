/* A CUDA runtime without a GPU: an H100 to ask about, memory of the host, kernels that never run.
 *
 * Preloaded before torch (see dry_gpu.py), it serves torch's own calls, cuBLAS' and those of our
 * kernels' objects. What is above the runtime is the real thing: dispatcher, autograd, allocator,
 * tensor hand-over. Launches are counted and can be named; waits of the host are counted.
 */

#include <driver_types.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))
#define OK_ALIAS(name) \
    __asm__(".globl " #name "\n.type " #name ", @function\n.set " #name ", dry_success");

enum { LAUNCHES_KEPT = 4096, DEVICES = 1, MULTIPROCESSORS = 132 };

EXPORT int dry_success(void) { return 0; }

/* ---- what happened ---- */

EXPORT atomic_long dry_launches, dry_waits, dry_copies, dry_allocations;
static const void *launched[LAUNCHES_KEPT];

static int launch(const void *kernel) {
    launched[atomic_fetch_add(&dry_launches, 1) % LAUNCHES_KEPT] = kernel;
    return 0;
}

typedef struct {
    const void *kernel;
    const char *name;
} Named;
static Named *named;
static size_t named_count, named_room;

static void give_name(const void *kernel, const char *name) {
    if (named_count == named_room) {
        named_room = named_room ? 2 * named_room : 1 << 16;
        named = realloc(named, named_room * sizeof *named);
    }
    named[named_count++] = (Named){kernel, name};
}

static const char gemm, fill;
__attribute__((constructor)) static void name_what_is_no_kernel(void) {
    give_name(&gemm, "gemm"), give_name(&fill, "memset");
}

EXPORT const char *dry_launch_name(long number) {
    const void *kernel = launched[number % LAUNCHES_KEPT];
    for (size_t i = 0; i < named_count; ++i)
        if (named[i].kernel == kernel) return named[i].name;
    return "?";
}

/* ---- kernels ---- */

EXPORT void **__cudaRegisterFatBinary(void *binary) {
    static void *handle;
    return &handle;
}
EXPORT void __cudaRegisterFunction(void **binary, const char *host, char *device, const char *name,
                                   int limit, void *tid, void *bid, void *block, void *grid,
                                   int *size) {
    give_name(host, name);
}
EXPORT int __cudaGetKernel(const void **kernel, const void *host) {
    *kernel = host;
    return 0;
}
EXPORT int __cudaPopCallConfiguration(void *grid, void *block, size_t *shared, void **stream) {
    memset(grid, 0, 12), memset(block, 0, 12);
    *shared = 0, *stream = NULL;
    return 0;
}
typedef struct {
    unsigned x, y, z;
} Extent;
EXPORT int __cudaLaunchKernel(const void *kernel, Extent grid, Extent block, void **arguments,
                              size_t shared, void *stream) {
    return launch(kernel);
}
EXPORT int cudaLaunchKernel(const void *kernel, Extent grid, Extent block, void **arguments,
                            size_t shared, void *stream) {
    return launch(kernel);
}
EXPORT int cudaLaunchKernelExC(const void *config, const void *kernel, void **arguments) {
    return launch(kernel);
}
EXPORT int _cudaLaunchKernelEx(const void *config, const void *kernel, void **arguments) {
    return launch(kernel);
}
static int library_kernel(void **kernel, const char *name) {
    *kernel = malloc(1);
    give_name(*kernel, strdup(name));
    return 0;
}
EXPORT int cudaLibraryGetKernel(void **kernel, void *library, const char *name) {
    return library_kernel(kernel, name);
}
EXPORT int _cudaLibraryGetKernel(void **kernel, void *library, const char *name) {
    return library_kernel(kernel, name);
}
EXPORT int cuModuleLoadData(void **module) {
    *module = malloc(1);
    return 0;
}
EXPORT int cuModuleGetFunction(void **kernel, void *module, const char *name) {
    return library_kernel(kernel, name);
}
EXPORT int cuLaunchKernel(const void *kernel) { return launch(kernel); }
static int load_library(void **library) {
    *library = malloc(1);
    return 0;
}
EXPORT int cudaLibraryLoadData(void **library) { return load_library(library); }
EXPORT int _cudaLibraryLoadData(void **library) { return load_library(library); }
/* of the DSL's runtime, whose own calls another preloaded function cannot catch */
EXPORT int cuda_dialect_init_library_once(void **library, int (*load)(void **),
                                          int (*prepare)(void **, int)) {
    int error = 0;
    if (*library) return 0;
    if (!(error = load(library)) && prepare) error = prepare(library, 0);
    return error;
}
static int zero_out(int *value) {
    *value = 0;
    return 0;
}
EXPORT int _cuKernelGetAttribute(int *value, int what, void *kernel, int device) {
    return zero_out(value);
}
EXPORT int cudaFuncGetAttributes(struct cudaFuncAttributes *attributes, const void *kernel) {
    memset(attributes, 0, sizeof *attributes);
    attributes->maxThreadsPerBlock = 1024;
    return 0;
}
EXPORT int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *kernel,
                                                                  int threads, size_t shared,
                                                                  unsigned flags) {
    *blocks = 4;
    return 0;
}

/* ---- the device ---- */

EXPORT int cudaGetDeviceCount(int *count) {
    *count = DEVICES;
    return 0;
}
EXPORT int cudaGetDevice(int *device) { return zero_out(device); }
EXPORT int _cudaGetDevice(int *device) { return zero_out(device); }
EXPORT int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) {
    *flags = 0, *active = 1;
    return 0;
}
EXPORT int cuCtxGetCurrent(void **context) {
    static int only;
    *context = &only;
    return 0;
}
EXPORT int cudaDriverGetVersion(int *version) {
    *version = 13000;
    return 0;
}
EXPORT int cudaRuntimeGetVersion(int *version) { return cudaDriverGetVersion(version); }
EXPORT int cudaGetDeviceProperties(struct cudaDeviceProp *device, int index) {
    memset(device, 0, sizeof *device);
    strcpy(device->name, "no GPU");
    device->major = 9;
    device->multiProcessorCount = MULTIPROCESSORS;
    device->warpSize = 32;
    device->maxThreadsPerBlock = 1024;
    device->maxThreadsPerMultiProcessor = 2048;
    device->maxThreadsDim[0] = device->maxThreadsDim[1] = 1024, device->maxThreadsDim[2] = 64;
    device->maxGridSize[0] = 0x7fffffff, device->maxGridSize[1] = device->maxGridSize[2] = 65535;
    device->totalGlobalMem = 80ull << 30;
    device->sharedMemPerBlock = 48 << 10;
    device->sharedMemPerBlockOptin = 227 << 10;
    device->sharedMemPerMultiprocessor = 228 << 10;
    device->regsPerBlock = device->regsPerMultiprocessor = 65536;
    device->l2CacheSize = 50 << 20;
    device->textureAlignment = 512;
    device->unifiedAddressing = 1;
    return 0;
}
static int attribute(int *value, int what) {
    switch (what) {
        case cudaDevAttrMultiProcessorCount: *value = MULTIPROCESSORS; return 0;
        case cudaDevAttrComputeCapabilityMajor: *value = 9; return 0;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = 227 << 10; return 0;
        default: return zero_out(value);
    }
}
EXPORT int cudaDeviceGetAttribute(int *value, int what, int device) {
    return attribute(value, what);
}
EXPORT int _cudaDeviceGetAttribute(int *value, int what, int device) {
    return attribute(value, what);
}
EXPORT int cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
    return zero_out(least), zero_out(greatest);
}
EXPORT const char *cudaGetErrorString(int error) { return "of a GPU that is not there"; }
EXPORT const char *cudaGetErrorName(int error) { return "error"; }
EXPORT int cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned version,
                                            unsigned long long flags, int *status) {
    *function = (void *)dry_success;
    if (status) *status = 0;
    return 0;
}

/* ---- memory: the host's, untouched pages cost nothing ---- */

static int allocate(void **pointer, size_t bytes) {
    atomic_fetch_add(&dry_allocations, 1);
    return posix_memalign(pointer, 512, bytes) ? cudaErrorMemoryAllocation : 0;
}
EXPORT int cudaMalloc(void **pointer, size_t bytes) { return allocate(pointer, bytes); }
EXPORT int cudaHostAlloc(void **pointer, size_t bytes, unsigned flags) {
    return allocate(pointer, bytes);
}
EXPORT int cudaFree(void *pointer) {
    free(pointer);
    return 0;
}
EXPORT int cudaFreeHost(void *pointer) { return cudaFree(pointer); }
EXPORT int cudaMemGetInfo(size_t *left, size_t *total) {
    *left = 79ull << 30, *total = 80ull << 30;
    return 0;
}
EXPORT int cudaMemcpyAsync(void *to, const void *from, size_t bytes, int kind, void *stream) {
    atomic_fetch_add(&dry_copies, 1);
    memmove(to, from, bytes);
    return 0;
}
EXPORT int cudaMemcpy(void *to, const void *from, size_t bytes, int kind) {
    atomic_fetch_add(&dry_waits, 1);
    return cudaMemcpyAsync(to, from, bytes, kind, NULL);
}
EXPORT int cudaMemsetAsync(void *to, int value, size_t bytes, void *stream) {
    memset(to, value, bytes);
    return launch(&fill);
}
EXPORT int cudaPointerGetAttributes(struct cudaPointerAttributes *attributes, const void *pointer) {
    memset(attributes, 0, sizeof *attributes);
    attributes->type = cudaMemoryTypeDevice;
    return 0;
}

/* ---- streams and events ---- */

static int make(void **handle) {
    *handle = malloc(1);
    return 0;
}
static int wait_for_nothing(void) {
    atomic_fetch_add(&dry_waits, 1);
    return 0;
}
EXPORT int cudaStreamCreateWithPriority(void **stream, unsigned flags, int priority) {
    return make(stream);
}
EXPORT int cudaStreamCreateWithFlags(void **stream, unsigned flags) { return make(stream); }
EXPORT int cudaStreamIsCapturing(void *stream, int *status) { return zero_out(status); }
EXPORT int cudaStreamGetCaptureInfo(void *stream, int *status, void *id, void *graph, void *nodes,
                                    void *edges, void *count) {
    return zero_out(status);
}
EXPORT int cudaStreamGetPriority(void *stream, int *priority) { return zero_out(priority); }
EXPORT int cudaEventCreate(void **event) { return make(event); }
EXPORT int cudaEventCreateWithFlags(void **event, unsigned flags) { return make(event); }
EXPORT int cudaEventElapsedTime(float *ms, void *from, void *to) {
    *ms = 0;
    return 0;
}
EXPORT int cudaStreamSynchronize(void *stream) { return wait_for_nothing(); }
EXPORT int cudaDeviceSynchronize(void) { return wait_for_nothing(); }
EXPORT int cudaEventSynchronize(void *event) { return wait_for_nothing(); }

/* ---- cuBLAS ---- */

static int launch_gemm(void) { return launch(&gemm); }
EXPORT int cublasCreate_v2(void **handle) {
    return make(handle);
}
EXPORT int cublasGetMathMode(void *handle, int *mode) { return zero_out(mode); }
EXPORT int cublasGetPointerMode_v2(void *handle, int *mode) { return zero_out(mode); }
EXPORT int cublasGemmEx(void) { return launch_gemm(); }
EXPORT int cublasGemmStridedBatchedEx(void) { return launch_gemm(); }
EXPORT int cublasSgemm_v2(void) { return launch_gemm(); }
EXPORT int cublasSgemmStridedBatched(void) { return launch_gemm(); }
EXPORT int cublasLtMatmul(void) { return launch_gemm(); }
EXPORT int cublasSdot_v2(void) { return launch_gemm(); }
EXPORT int cublasDotEx(void) { return launch_gemm(); }
EXPORT size_t cublasLtGetVersion(void) { return 130000; }
EXPORT int cublasLtMatmulDescCreate(void **handle) { return make(handle); }
EXPORT int cublasLtMatrixLayoutCreate(void **handle) { return make(handle); }
EXPORT int cublasLtMatmulPreferenceCreate(void **handle) { return make(handle); }
EXPORT int cublasLtMatmulAlgoGetHeuristic(void *handle, void *operation, void *a, void *b, void *c,
                                          void *d, void *preference, int wanted, void *results,
                                          int *found) {
    *found = 1;
    return 0;
}

OK_ALIAS(__cudaRegisterFatBinaryEnd)
OK_ALIAS(__cudaUnregisterFatBinary)
OK_ALIAS(__cudaRegisterVar)
OK_ALIAS(__cudaPushCallConfiguration)
OK_ALIAS(cudaFuncSetAttribute)
OK_ALIAS(_cudaFuncSetAttribute)
OK_ALIAS(cudaKernelSetAttributeForDevice)
OK_ALIAS(_cudaKernelSetAttributeForDevice)
OK_ALIAS(cudaLibraryUnload)
OK_ALIAS(_cudaLibraryUnload)
OK_ALIAS(cudaSetDevice)
OK_ALIAS(_cudaSetDevice)
OK_ALIAS(cudaGetLastError)
OK_ALIAS(cudaPeekAtLastError)
OK_ALIAS(cudaDeviceCanAccessPeer)
OK_ALIAS(cudaThreadExchangeStreamCaptureMode)
OK_ALIAS(cudaStreamDestroy)
OK_ALIAS(cudaStreamQuery)
OK_ALIAS(cudaStreamWaitEvent)
OK_ALIAS(cudaEventDestroy)
OK_ALIAS(cudaEventQuery)
OK_ALIAS(cudaEventRecord)
OK_ALIAS(cudaEventRecordWithFlags)
OK_ALIAS(cuCtxSetCurrent)
OK_ALIAS(cuDevicePrimaryCtxRetain)
OK_ALIAS(cublasDestroy_v2)
OK_ALIAS(cublasSetStream_v2)
OK_ALIAS(cublasSetWorkspace_v2)
OK_ALIAS(cublasSetMathMode)
OK_ALIAS(cublasSetPointerMode_v2)
OK_ALIAS(cublasSetSmCountTarget)
OK_ALIAS(cublasLtMatmulDescDestroy)
OK_ALIAS(cublasLtMatmulDescSetAttribute)
OK_ALIAS(cublasLtMatrixLayoutDestroy)
OK_ALIAS(cublasLtMatrixLayoutSetAttribute)
OK_ALIAS(cublasLtMatmulPreferenceDestroy)
OK_ALIAS(cublasLtMatmulPreferenceSetAttribute)
