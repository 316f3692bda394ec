// NCCL between processes of one machine whose device memory is host memory (cuda_runtime.c). A message is a file; every call blocks
// until it is done, whatever stream it is given. Ranks that disagree about the size of a message end with a line that says so.
// Files lie in FAKE_GPU_FOLDER, else in TMPDIR, which must be the same folder for all ranks: tests give each run one of its own.
#define _GNU_SOURCE
#include <nccl.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define RANKS 64
#define PATIENCE_S 300

typedef struct ncclComm {
    char id[48];
    int rank, ranks;
    long collectives;                // collective operations so far
    long sent[RANKS], taken[RANKS]; // messages to and from each other rank so far
} Group;

extern cudaError_t cudaMalloc(void **, size_t);

static void tell(const char *what, const Group *group, size_t bytes) {
    if (getenv("FAKE_GPU_TRACE")) fprintf(stderr, "[fake NCCL] rank %d of %d: %s, %zu bytes\n", group->rank, group->ranks, what, bytes);
}

static void *reserve(size_t bytes) {
    void *memory = malloc(bytes + 1);
    if (!memory) {
        fprintf(stderr, "[fake NCCL] no memory for %zu bytes\n", bytes);
        abort();
    }
    return memory;
}

static size_t size_of(ncclDataType_t type) {
    switch (type) {
    case ncclInt8:
    case ncclUint8:
    case ncclFloat8e4m3:
    case ncclFloat8e5m2: return 1;
    case ncclFloat16:
    case ncclBfloat16: return 2;
    case ncclInt32:
    case ncclUint32:
    case ncclFloat32: return 4;
    default: return 8;
    }
}

// Messages

static void path_of(char *path, const Group *group, const char *kind, long number, int from, int to) {
    const char *folder = getenv("FAKE_GPU_FOLDER");
    if (!folder) folder = getenv("TMPDIR");
    snprintf(path, 500, "%s/fake_nccl_%s_%s_%ld_%d_%d", folder ? folder : "/tmp", group->id, kind, number, from, to);
}

static void post(const Group *group, const char *kind, long number, int to, const void *data, size_t bytes) {
    char path[512], unfinished[520];
    path_of(path, group, kind, number, group->rank, to);
    snprintf(unfinished, sizeof unfinished, "%s.part", path);
    int file = open(unfinished, O_CREAT | O_WRONLY | O_TRUNC, 0600);
    for (size_t done = 0; done < bytes;) {
        ssize_t more = write(file, (const char *)data + done, bytes - done);
        if (more <= 0) {
            perror("[fake NCCL] write");
            abort();
        }
        done += more;
    }
    close(file);
    rename(unfinished, path); // so that a reader finds it whole
}

static void differ(const Group *group, const char *path, size_t bytes) {
    fprintf(stderr, "[fake NCCL] rank %d wants %zu bytes, %s has another size: ranks disagree\n", group->rank, bytes, path);
    abort();
}

static void take(const Group *group, const char *kind, long number, int from, int to, void *data, size_t bytes) {
    char path[512], extra;
    int file;
    path_of(path, group, kind, number, from, to);
    for (double waited = 0; (file = open(path, O_RDONLY)) < 0; waited += 1e-4) {
        usleep(100);
        if (waited > PATIENCE_S) {
            fprintf(stderr, "[fake NCCL] rank %d waited in vain for %s\n", group->rank, path);
            abort();
        }
    }
    for (size_t done = 0; done < bytes;) {
        ssize_t more = read(file, (char *)data + done, bytes - done);
        if (more <= 0) differ(group, path, bytes);
        done += more;
    }
    if (read(file, &extra, 1) == 1) differ(group, path, bytes);
    close(file);
}

static void forget(const Group *group, const char *kind, long number, int from, int to) {
    char path[512];
    path_of(path, group, kind, number, from, to);
    unlink(path);
}

// Every rank's bytes, in the order of ranks. A rank's file may go two operations later: by then all others have read it.
static void gather(Group *group, const void *mine, void *all, size_t bytes) {
    long number = group->collectives++;
    post(group, "all", number, 0, mine, bytes);
    for (int rank = 0; rank < group->ranks; rank++) {
        char *place = (char *)all + rank * bytes;
        if (rank == group->rank) memmove(place, mine, bytes);
        else take(group, "all", number, rank, 0, place, bytes);
    }
    if (number >= 2) forget(group, "all", number - 2, group->rank, 0);
}

// Groups

ncclResult_t ncclGetVersion(int *version) {
    *version = NCCL_VERSION_CODE;
    return ncclSuccess;
}
const char *ncclGetErrorString(ncclResult_t result) { return result ? "an error of the fake NCCL" : "no error"; }
const char *ncclGetLastError(ncclComm_t group) { return ""; }

ncclResult_t ncclGetUniqueId(ncclUniqueId *id) {
    unsigned char random[12];
    int file = open("/dev/urandom", O_RDONLY);
    memset(id, 0, sizeof *id);
    if (read(file, random, sizeof random) != sizeof random) return ncclSystemError;
    close(file);
    for (size_t i = 0; i < sizeof random; i++) sprintf(id->internal + 2 * i, "%02x", random[i]);
    return ncclSuccess;
}

static Group *form(int ranks, int rank) {
    if (ranks > RANKS) {
        fprintf(stderr, "[fake NCCL] a group of %d ranks; at most %d\n", ranks, RANKS);
        abort();
    }
    Group *group = calloc(1, sizeof *group);
    group->rank = rank;
    group->ranks = ranks;
    return group;
}

ncclResult_t ncclCommInitRankConfig(ncclComm_t *group, int ranks, ncclUniqueId id, int rank, ncclConfig_t *config) {
    int all[RANKS];
    *group = form(ranks, rank);
    strncpy((*group)->id, id.internal, sizeof(*group)->id - 1);
    tell("joins", *group, 0);
    gather(*group, &rank, all, sizeof rank); // returns when all have joined
    return ncclSuccess;
}
ncclResult_t ncclCommInitRank(ncclComm_t *group, int ranks, ncclUniqueId id, int rank) {
    return ncclCommInitRankConfig(group, ranks, id, rank, 0);
}
ncclResult_t ncclCommInitRankScalable(ncclComm_t *group, int ranks, int rank, int n, ncclUniqueId *ids, ncclConfig_t *config) {
    return ncclCommInitRankConfig(group, ranks, ids[0], rank, config);
}

ncclResult_t ncclCommSplit(ncclComm_t whole, int color, int key, ncclComm_t *group, ncclConfig_t *config) {
    int mine[2] = {color, key}, all[2 * RANKS], ranks = 0, rank = 0;
    gather(whole, mine, all, sizeof mine);
    *group = 0;
    if (color == NCCL_SPLIT_NOCOLOR) return ncclSuccess;
    for (int other = 0; other < whole->ranks; other++)
        if (all[2 * other] == color) {
            ranks++;
            rank += all[2 * other + 1] < key || (all[2 * other + 1] == key && other < whole->rank);
        }
    *group = form(ranks, rank);
    snprintf((*group)->id, sizeof(*group)->id, "%.24s-%ld-%d", whole->id, whole->collectives, color);
    return ncclSuccess;
}

ncclResult_t ncclCommCount(const ncclComm_t group, int *ranks) {
    *ranks = group->ranks;
    return ncclSuccess;
}
ncclResult_t ncclCommUserRank(const ncclComm_t group, int *rank) {
    *rank = group->rank;
    return ncclSuccess;
}
ncclResult_t ncclCommCuDevice(const ncclComm_t group, int *device) {
    *device = 0;
    return ncclSuccess;
}
ncclResult_t ncclCommGetAsyncError(ncclComm_t group, ncclResult_t *error) {
    *error = ncclSuccess;
    return ncclSuccess;
}
ncclResult_t ncclMemAlloc(void **memory, size_t bytes) { return (ncclResult_t)cudaMalloc(memory, bytes); }

// Collective operations

static float float_of(uint16_t bfloat16) {
    uint32_t bits = (uint32_t)bfloat16 << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
static uint16_t bfloat16_of(float value) { // to nearest, ties to even
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return value != value ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

#define COMBINED(a, b) \
    (operation == ncclMax ? ((b) > (a) ? (b) : (a)) : operation == ncclMin ? ((b) < (a) ? (b) : (a)) : operation == ncclProd ? (a) * (b) : (a) + (b))
#define COMBINE(type) \
    { \
        type *a = out; \
        const type *b = in; \
        for (size_t i = 0; i < count; i++) a[i] = COMBINED(a[i], b[i]); \
        break; \
    }

static void combine(void *out, const void *in, size_t count, ncclDataType_t type, ncclRedOp_t operation) {
    switch (type) {
    case ncclFloat32: COMBINE(float)
    case ncclFloat64: COMBINE(double)
    case ncclInt8: COMBINE(signed char)
    case ncclUint8: COMBINE(unsigned char)
    case ncclInt32: COMBINE(int)
    case ncclUint32: COMBINE(unsigned)
    case ncclInt64: COMBINE(long)
    case ncclUint64: COMBINE(unsigned long)
    case ncclBfloat16: {
        uint16_t *a = out;
        const uint16_t *b = in;
        for (size_t i = 0; i < count; i++) a[i] = bfloat16_of(COMBINED(float_of(a[i]), float_of(b[i])));
        break;
    }
    default: fprintf(stderr, "[fake NCCL] cannot combine numbers of type %d\n", type); abort();
    }
}

static void divide(void *out, size_t count, ncclDataType_t type, int by) {
    for (size_t i = 0; i < count; i++) {
        if (type == ncclFloat32) ((float *)out)[i] /= by;
        else if (type == ncclFloat64) ((double *)out)[i] /= by;
        else if (type == ncclBfloat16) ((uint16_t *)out)[i] = bfloat16_of(float_of(((uint16_t *)out)[i]) / by);
    }
}

// What all ranks have, combined in the order of ranks; the caller frees it.
static char *reduced(Group *group, const void *mine, size_t count, ncclDataType_t type, ncclRedOp_t operation) {
    size_t bytes = count * size_of(type);
    char *all = reserve(bytes * group->ranks);
    gather(group, mine, all, bytes);
    for (int rank = 1; rank < group->ranks; rank++) combine(all, all + rank * bytes, count, type, operation);
    if (operation == ncclAvg) divide(all, count, type, group->ranks);
    return all;
}

ncclResult_t ncclAllReduce(const void *send, void *receive, size_t count, ncclDataType_t type, ncclRedOp_t operation, ncclComm_t group, cudaStream_t stream) {
    tell("all-reduce", group, count * size_of(type));
    char *result = reduced(group, send, count, type, operation);
    memcpy(receive, result, count * size_of(type));
    free(result);
    return ncclSuccess;
}
ncclResult_t ncclReduce(const void *send, void *receive, size_t count, ncclDataType_t type, ncclRedOp_t operation, int root, ncclComm_t group, cudaStream_t stream) {
    tell("reduce", group, count * size_of(type));
    char *result = reduced(group, send, count, type, operation);
    if (group->rank == root) memcpy(receive, result, count * size_of(type));
    free(result);
    return ncclSuccess;
}
ncclResult_t ncclReduceScatter(const void *send, void *receive, size_t count, ncclDataType_t type, ncclRedOp_t operation, ncclComm_t group, cudaStream_t stream) {
    tell("reduce-scatter", group, count * size_of(type));
    char *result = reduced(group, send, count * group->ranks, type, operation);
    memcpy(receive, result + group->rank * count * size_of(type), count * size_of(type));
    free(result);
    return ncclSuccess;
}
ncclResult_t ncclAllGather(const void *send, void *receive, size_t count, ncclDataType_t type, ncclComm_t group, cudaStream_t stream) {
    size_t bytes = count * size_of(type);
    tell("all-gather", group, bytes);
    char *all = reserve(bytes * group->ranks); // `send` may be a part of `receive`
    gather(group, send, all, bytes);
    memcpy(receive, all, bytes * group->ranks);
    free(all);
    return ncclSuccess;
}
ncclResult_t ncclBroadcast(const void *send, void *receive, size_t count, ncclDataType_t type, int root, ncclComm_t group, cudaStream_t stream) {
    size_t bytes = count * size_of(type);
    tell("broadcast", group, bytes);
    char *all = reserve(bytes * group->ranks);
    gather(group, group->rank == root ? send : receive, all, bytes);
    memcpy(receive, all + bytes * root, bytes);
    free(all);
    return ncclSuccess;
}
ncclResult_t ncclBcast(void *data, size_t count, ncclDataType_t type, int root, ncclComm_t group, cudaStream_t stream) {
    return ncclBroadcast(data, data, count, type, root, group, stream);
}
ncclResult_t ncclAlltoAll(const void *send, void *receive, size_t count, ncclDataType_t type, ncclComm_t group, cudaStream_t stream) {
    size_t bytes = count * size_of(type), all_bytes = bytes * group->ranks;
    char *all = reserve(all_bytes * group->ranks);
    tell("all-to-all", group, bytes);
    gather(group, send, all, all_bytes);
    for (int rank = 0; rank < group->ranks; rank++) memcpy((char *)receive + rank * bytes, all + rank * all_bytes + group->rank * bytes, bytes);
    free(all);
    return ncclSuccess;
}

// Messages between two ranks: those of a group of calls are sent first and taken then.

typedef struct {
    int sends, peer;
    void *data;
    size_t bytes;
    Group *group;
    long number;
} Message;
static __thread Message waiting[4096];
static __thread int count = 0, depth = 0;

static void deliver(void) {
    for (Message *m = waiting; m < waiting + count; m++)
        if (m->sends) post(m->group, "to", m->number, m->peer, m->data, m->bytes);
    for (Message *m = waiting; m < waiting + count; m++)
        if (!m->sends) {
            take(m->group, "to", m->number, m->peer, m->group->rank, m->data, m->bytes);
            forget(m->group, "to", m->number, m->peer, m->group->rank);
        }
    count = 0;
}
static ncclResult_t add(int sends, void *data, size_t bytes, int peer, Group *group) {
    tell(sends ? "sends" : "receives", group, bytes);
    waiting[count++] = (Message){sends, peer, data, bytes, group, sends ? group->sent[peer]++ : group->taken[peer]++};
    if (!depth) deliver();
    return ncclSuccess;
}
ncclResult_t ncclSend(const void *data, size_t n, ncclDataType_t type, int peer, ncclComm_t group, cudaStream_t stream) {
    return add(1, (void *)data, n * size_of(type), peer, group);
}
ncclResult_t ncclRecv(void *data, size_t n, ncclDataType_t type, int peer, ncclComm_t group, cudaStream_t stream) {
    return add(0, data, n * size_of(type), peer, group);
}
ncclResult_t ncclGroupStart(void) {
    depth++;
    return ncclSuccess;
}
ncclResult_t ncclGroupEnd(void) {
    if (--depth == 0) deliver();
    return ncclSuccess;
}
