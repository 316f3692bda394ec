// A CUDA runtime without a GPU. Device memory is shared memory of the host (one memfd for each allocation), copies are memcpy, streams
// and events are done at once, a handle for another process opens that process's memory, and kernels are counted and not run:
// host_operators.cpp computes in their place. Whatever is not written here is a stub that returns cudaSuccess (build.py).
//
// FAKE_GPU_DEVICES: number of devices (8). CUDA_VISIBLE_DEVICES is heeded, as by the real one.
// FAKE_GPU_STUCK: names a file; while it exists, no event happens, as when a peer of a collective operation hangs.
// FAKE_GPU_TRACE: tells of each kernel that is launched and of each stub that is called.
#define _GNU_SOURCE
#include <cuda_runtime_api.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define CALL(declaration, ...) \
    cudaError_t declaration { \
        __VA_ARGS__; \
        return cudaSuccess; \
    }

static void tell(const char *what, const char *name) {
    if (getenv("FAKE_GPU_TRACE")) fprintf(stderr, "[fake GPU] %s %s\n", what, name);
}

// Devices: H100s of 80 GiB

#define MEMORY (80ull << 30)
static __thread int device = 0;

static int devices(void) {
    const char *visible = getenv("CUDA_VISIBLE_DEVICES"), *all = getenv("FAKE_GPU_DEVICES");
    if (!visible) return all ? atoi(all) : 8;
    int count = *visible != 0;
    for (; *visible; visible++) count += *visible == ',';
    return count;
}
static int number_of(int visible_device) { // among all devices of the machine
    const char *visible = getenv("CUDA_VISIBLE_DEVICES");
    for (int i = 0; visible && i < visible_device; i++) {
        visible = strchr(visible, ',');
        visible += visible != 0;
    }
    return visible ? atoi(visible) : visible_device;
}

cudaError_t cudaGetDeviceCount(int *count) {
    *count = devices();
    return *count ? cudaSuccess : cudaErrorNoDevice;
}
cudaError_t cudaSetDevice(int d) {
    if (d < 0 || d >= devices()) return cudaErrorInvalidDevice;
    device = d;
    return cudaSuccess;
}
CALL(cudaGetDevice(int *d), *d = device)
CALL(cudaDriverGetVersion(int *version), *version = 13000)
CALL(cudaRuntimeGetVersion(int *version), *version = 13000)
CALL(cudaGetDeviceFlags(unsigned *flags), *flags = 0)
CALL(cudaDeviceCanAccessPeer(int *can, int a, int b), *can = 1)
CALL(cudaDeviceGetLimit(size_t *value, enum cudaLimit limit), *value = 1 << 20)
CALL(cudaDeviceGetPCIBusId(char *id, int room, int d), snprintf(id, room, "0000:%02x:00.0", 1 + number_of(d)))
CALL(cudaDeviceGetStreamPriorityRange(int *least, int *greatest), if (least) *least = 0; if (greatest) *greatest = -5)

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int d) {
    *p = (struct cudaDeviceProp){.name = "Fake H100 (no GPU)", .totalGlobalMem = MEMORY, .major = 9, .minor = 0};
    memset(&p->uuid, 0x5a, sizeof p->uuid);
    p->uuid.bytes[15] = number_of(d);
    p->pciBusID = 1 + number_of(d);
    p->multiProcessorCount = 132;
    p->warpSize = 32;
    p->maxThreadsPerBlock = p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
    p->maxThreadsDim[2] = 64;
    p->maxThreadsPerMultiProcessor = 2048;
    p->maxBlocksPerMultiProcessor = 32;
    p->maxGridSize[0] = 2147483647;
    p->maxGridSize[1] = p->maxGridSize[2] = 65535;
    p->regsPerBlock = p->regsPerMultiprocessor = 65536;
    p->sharedMemPerBlock = 49152;
    p->sharedMemPerBlockOptin = 232448;
    p->sharedMemPerMultiprocessor = 233472;
    p->l2CacheSize = 50 << 20;
    p->totalConstMem = 65536;
    p->textureAlignment = 512;
    p->asyncEngineCount = 3;
    p->unifiedAddressing = p->canMapHostMemory = p->cooperativeLaunch = p->concurrentKernels = 1;
    return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int d) {
    struct cudaDeviceProp p;
    cudaGetDeviceProperties(&p, d);
    switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value = p.major; break;
    case cudaDevAttrComputeCapabilityMinor: *value = p.minor; break;
    case cudaDevAttrMultiProcessorCount: *value = p.multiProcessorCount; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = p.sharedMemPerBlock; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = p.sharedMemPerBlockOptin; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = p.sharedMemPerMultiprocessor; break;
    case cudaDevAttrWarpSize: *value = p.warpSize; break;
    case cudaDevAttrMaxThreadsPerBlock: *value = p.maxThreadsPerBlock; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = p.maxThreadsPerMultiProcessor; break;
    case cudaDevAttrMaxBlocksPerMultiprocessor: *value = p.maxBlocksPerMultiProcessor; break;
    case cudaDevAttrMaxGridDimX: *value = p.maxGridSize[0]; break;
    case cudaDevAttrMaxGridDimY:
    case cudaDevAttrMaxGridDimZ: *value = p.maxGridSize[1]; break;
    case cudaDevAttrMaxRegistersPerBlock: *value = p.regsPerBlock; break;
    case cudaDevAttrL2CacheSize: *value = p.l2CacheSize; break;
    case cudaDevAttrCooperativeLaunch:
    case cudaDevAttrUnifiedAddressing:
    case cudaDevAttrMemoryPoolsSupported: *value = 1; break;
    default: *value = 0;
    }
    return cudaSuccess;
}

// Memory

enum Kind { NOT_OURS, PINNED, ON_DEVICE, OF_ANOTHER_PROCESS };
typedef struct Allocation {
    char *start;
    size_t bytes;
    int file;
    enum Kind kind;
    int device;
    struct Allocation *next;
} Allocation;
static Allocation *allocations = 0;
static size_t held = 0; // bytes on the device
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static void *map(int file, size_t bytes, enum Kind kind) {
    char *start = mmap(0, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (start == MAP_FAILED) {
        close(file);
        return 0;
    }
    Allocation *allocation = malloc(sizeof *allocation);
    pthread_mutex_lock(&lock);
    *allocation = (Allocation){start, bytes, file, kind, device, allocations};
    allocations = allocation;
    if (kind == ON_DEVICE) held += bytes;
    pthread_mutex_unlock(&lock);
    return start;
}
static void *allocate(size_t bytes, enum Kind kind) {
    bytes = (bytes + 4096) & ~4095ull;
    int file = memfd_create("fake_gpu", 0);
    if (file < 0 || ftruncate(file, bytes)) return 0;
    return map(file, bytes, kind);
}
static int release(const void *start) {
    int was_ours = 0;
    pthread_mutex_lock(&lock);
    for (Allocation **link = &allocations; *link && !was_ours;)
        if ((*link)->start == start) {
            Allocation *allocation = *link;
            *link = allocation->next;
            if (allocation->kind == ON_DEVICE) held -= allocation->bytes;
            munmap(allocation->start, allocation->bytes);
            close(allocation->file);
            free(allocation);
            was_ours = 1;
        } else link = &(*link)->next;
    pthread_mutex_unlock(&lock);
    return was_ours;
}
static Allocation allocation_of(const char *address) {
    Allocation result = {0};
    pthread_mutex_lock(&lock);
    for (Allocation *a = allocations; a; a = a->next)
        if (address >= a->start && address < a->start + a->bytes) result = *a;
    pthread_mutex_unlock(&lock);
    return result;
}

cudaError_t cudaMalloc(void **memory, size_t bytes) {
    if (held + bytes > MEMORY) return cudaErrorMemoryAllocation;
    *memory = bytes ? allocate(bytes, ON_DEVICE) : 0;
    return bytes && !*memory ? cudaErrorMemoryAllocation : cudaSuccess;
}
cudaError_t cudaHostAlloc(void **memory, size_t bytes, unsigned flags) {
    *memory = allocate(bytes, PINNED);
    return *memory ? cudaSuccess : cudaErrorMemoryAllocation;
}
cudaError_t cudaMallocAsync(void **memory, size_t bytes, cudaStream_t stream) { return cudaMalloc(memory, bytes); }
cudaError_t cudaMallocManaged(void **memory, size_t bytes, unsigned flags) { return cudaMalloc(memory, bytes); }
cudaError_t cudaMallocHost(void **memory, size_t bytes) { return cudaHostAlloc(memory, bytes, 0); }
CALL(cudaFree(void *memory), release(memory))
CALL(cudaFreeAsync(void *memory, cudaStream_t stream), release(memory))
CALL(cudaFreeHost(void *memory), release(memory))
CALL(cudaHostGetDevicePointer(void **on_device, void *on_host, unsigned flags), *on_device = on_host)
CALL(cudaMemGetInfo(size_t *unused, size_t *total), *total = MEMORY; *unused = MEMORY - held)

cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *attributes, const void *address) {
    Allocation a = allocation_of(address);
    memset(attributes, 0, sizeof *attributes);
    attributes->type = a.kind == NOT_OURS ? cudaMemoryTypeUnregistered : a.kind == PINNED ? cudaMemoryTypeHost : cudaMemoryTypeDevice;
    attributes->device = a.kind == NOT_OURS ? -2 : a.device;
    attributes->devicePointer = a.kind == NOT_OURS ? 0 : (void *)address;
    attributes->hostPointer = a.kind == PINNED ? (void *)address : 0;
    return cudaSuccess;
}

CALL(cudaMemcpy(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind), memmove(to, from, bytes))
CALL(cudaMemcpyAsync(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind, cudaStream_t stream), memmove(to, from, bytes))
CALL(cudaMemcpyPeerAsync(void *to, int a, const void *from, int b, size_t bytes, cudaStream_t stream), memmove(to, from, bytes))
CALL(cudaMemset(void *memory, int value, size_t bytes), memset(memory, value, bytes))
CALL(cudaMemsetAsync(void *memory, int value, size_t bytes, cudaStream_t stream), memset(memory, value, bytes))
CALL(cudaMemset2DAsync(void *memory, size_t pitch, int value, size_t width, size_t height, cudaStream_t stream),
     for (size_t row = 0; row < height; row++) memset((char *)memory + row * pitch, value, width))
CALL(cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width, size_t height, enum cudaMemcpyKind kind, cudaStream_t stream),
     for (size_t row = 0; row < height; row++) memmove((char *)to + row * to_pitch, (char *)from + row * from_pitch, width))

// Memory of another process: a handle names the process and its memfd.

typedef struct {
    int process, file;
    size_t bytes;
} Handle;

cudaError_t cudaIpcGetMemHandle(cudaIpcMemHandle_t *handle, void *memory) {
    Allocation a = allocation_of(memory);
    if (a.kind != ON_DEVICE) return cudaErrorInvalidValue;
    Handle content = {getpid(), a.file, a.bytes};
    memset(handle, 0, sizeof *handle);
    memcpy(handle, &content, sizeof content);
    return cudaSuccess;
}
cudaError_t cudaIpcOpenMemHandle(void **memory, cudaIpcMemHandle_t handle, unsigned flags) {
    Handle content;
    char path[64];
    memcpy(&content, &handle, sizeof content);
    if (content.process == getpid()) return cudaErrorDeviceUninitialized; // the real one opens no memory of its own process
    snprintf(path, sizeof path, "/proc/%d/fd/%d", content.process, content.file);
    int file = open(path, O_RDWR);
    if (file < 0) return cudaErrorInvalidResourceHandle;
    *memory = map(file, content.bytes, OF_ANOTHER_PROCESS);
    return *memory ? cudaSuccess : cudaErrorMapBufferObjectFailed;
}
cudaError_t cudaIpcCloseMemHandle(void *memory) { return release(memory) ? cudaSuccess : cudaErrorInvalidValue; }
CALL(cudaIpcGetEventHandle(cudaIpcEventHandle_t *handle, cudaEvent_t event), memset(handle, 0, sizeof *handle))
CALL(cudaIpcOpenEventHandle(cudaEvent_t *event, cudaIpcEventHandle_t handle), *event = calloc(1, 64))

// Streams and events

CALL(cudaStreamCreate(cudaStream_t *stream), *stream = calloc(1, 64))
CALL(cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags), *stream = calloc(1, 64))
CALL(cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int priority), *stream = calloc(1, 64))
CALL(cudaStreamGetPriority(cudaStream_t stream, int *priority), *priority = 0)
CALL(cudaStreamGetFlags(cudaStream_t stream, unsigned *flags), *flags = 0)
CALL(cudaStreamGetId(cudaStream_t stream, unsigned long long *id), *id = (unsigned long long)stream)
CALL(cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status), *status = cudaStreamCaptureStatusNone)
CALL(cudaStreamGetCaptureInfo(cudaStream_t stream, enum cudaStreamCaptureStatus *status, unsigned long long *id, cudaGraph_t *graph,
                              const cudaGraphNode_t **nodes, const cudaGraphEdgeData **edges, size_t *count),
     if (status) *status = cudaStreamCaptureStatusNone; if (id) *id = 0; if (count) *count = 0)

static double milliseconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1e3 + t.tv_nsec / 1e6;
}
CALL(cudaEventCreate(cudaEvent_t *event), *event = calloc(1, 64))
CALL(cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags), *event = calloc(1, 64))
CALL(cudaEventRecord(cudaEvent_t event, cudaStream_t stream), *(double *)event = milliseconds())
CALL(cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned flags), *(double *)event = milliseconds())
CALL(cudaEventElapsedTime(float *passed, cudaEvent_t start, cudaEvent_t end), *passed = *(double *)end - *(double *)start;
     if (*passed <= 0) *passed = 1e-3f)
CALL(cudaEventDestroy(cudaEvent_t event), free(event))
cudaError_t cudaEventQuery(cudaEvent_t event) {
    const char *stuck = getenv("FAKE_GPU_STUCK");
    return stuck && access(stuck, F_OK) == 0 ? cudaErrorNotReady : cudaSuccess;
}

// Kernels: counted by name. Whatever is launched is not computed, so a rehearsal looks at the counts (startup.py).

typedef struct Kernel {
    const void *function;
    const char *name;
    long launches;
    struct Kernel *next;
} Kernel;
#define BUCKETS (1 << 16)
static Kernel *kernels[BUCKETS];
static Kernel **bucket(const void *function) { return kernels + (((size_t)function >> 4) * 2654435761u >> 16 & (BUCKETS - 1)); }

void __cudaRegisterFunction(void **binary, const char *function, char *on_device, const char *name, int limit, void *a, void *b, void *c, void *d, int *e) {
    Kernel *kernel = malloc(sizeof *kernel);
    *kernel = (Kernel){function, name, 0, *bucket(function)};
    *bucket(function) = kernel;
}
void **__cudaRegisterFatBinary(void *binary) { return calloc(1, 8); }
void __cudaRegisterFatBinaryEnd(void **binary) {}
void __cudaUnregisterFatBinary(void **binary) {}
void __cudaRegisterVar(void **binary, char *on_host, char *on_device, const char *name, int e, size_t bytes, int c, int g) {}
void __cudaRegisterManagedVar(void **binary, void **on_host, char *on_device, const char *name, int e, size_t bytes, int c, int g) {}
char __cudaInitModule(void **binary) { return 1; }

static __thread struct {
    dim3 grid, block;
    size_t shared;
    void *stream;
} pushed[16];
static __thread unsigned depth = 0;
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void *stream) {
    pushed[depth % 16].grid = grid;
    pushed[depth % 16].block = block;
    pushed[depth % 16].shared = shared;
    pushed[depth++ % 16].stream = stream;
    return 0;
}
CALL(__cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream), depth--; *grid = pushed[depth % 16].grid;
     *block = pushed[depth % 16].block; *shared = pushed[depth % 16].shared; *(void **)stream = pushed[depth % 16].stream)

static void launch(const void *function) {
    Kernel *kernel = *bucket(function);
    while (kernel && kernel->function != function) kernel = kernel->next;
    if (kernel && !kernel->launches++) tell("kernel", kernel->name);
}
CALL(cudaLaunchKernel(const void *f, dim3 grid, dim3 block, void **arguments, size_t shared, cudaStream_t stream), launch(f))
CALL(__cudaLaunchKernel(cudaKernel_t f, dim3 grid, dim3 block, void **arguments, size_t shared, cudaStream_t stream), launch(f))
CALL(cudaLaunchKernelExC(const cudaLaunchConfig_t *configuration, const void *f, void **arguments), launch(f))
CALL(cudaLaunchCooperativeKernel(const void *f, dim3 grid, dim3 block, void **arguments, size_t shared, cudaStream_t stream), launch(f))
CALL(cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void *data), function(data))
CALL(__cudaGetKernel(cudaKernel_t *kernel, const void *function), *kernel = (cudaKernel_t)function)
CALL(cudaGetKernel(cudaKernel_t *kernel, const void *function), *kernel = (cudaKernel_t)function)
CALL(cudaGetFuncBySymbol(cudaFunction_t *kernel, const void *function), *kernel = (cudaFunction_t)function)
CALL(cudaGetSymbolAddress(void **address, const void *symbol), *address = (void *)symbol)
CALL(cudaFuncGetAttributes(struct cudaFuncAttributes *a, const void *function),
     *a = ((struct cudaFuncAttributes){.maxThreadsPerBlock = 1024, .numRegs = 32, .ptxVersion = 90, .binaryVersion = 90, .maxDynamicSharedSizeBytes = 232448}))
CALL(cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, const void *function, int threads, size_t shared), *blocks = 2)
CALL(cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *function, int threads, size_t shared, unsigned flags), *blocks = 2)

// Writes the kernels that were launched, a line "launches name" each, and returns how many launches there were.
long fake_gpu_kernels(char *text, long room) {
    long total = 0, used = 0;
    for (int i = 0; i < BUCKETS; i++)
        for (Kernel *kernel = kernels[i]; kernel; kernel = kernel->next)
            if (kernel->launches) {
                total += kernel->launches;
                used += snprintf(text + used, room > used ? room - used : 0, "%ld %s\n", kernel->launches, kernel->name);
            }
    return total;
}

// The driver's functions that libraries look up by name: they get one that does nothing.

static int nothing(void) { return 0; }
CALL(cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned version, unsigned long long flags, enum cudaDriverEntryPointQueryResult *result),
     tell("driver's", name); *function = (void *)nothing; if (result) *result = cudaDriverEntryPointSuccess)
cudaError_t cudaGetDriverEntryPoint(const char *name, void **function, unsigned long long flags, enum cudaDriverEntryPointQueryResult *result) {
    return cudaGetDriverEntryPointByVersion(name, function, 0, flags, result);
}
CALL(cudaDeviceGetDefaultMemPool(cudaMemPool_t *pool, int d), *pool = calloc(1, 64))
CALL(cudaMemPoolCreate(cudaMemPool_t *pool, const struct cudaMemPoolProps *properties), *pool = calloc(1, 64))
CALL(cudaMemPoolGetAttribute(cudaMemPool_t pool, enum cudaMemPoolAttr attribute, void *value), *(unsigned long long *)value = 0)

const char *cudaGetErrorName(cudaError_t error) { return error ? "an error of the fake GPU" : "cudaSuccess"; }
const char *cudaGetErrorString(cudaError_t error) {
    static __thread char text[64];
    snprintf(text, sizeof text, error ? "error %d of the fake GPU" : "no error", error);
    return text;
}
