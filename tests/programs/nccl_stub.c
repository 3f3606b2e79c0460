/* The functions of NCCL that megatron_ext/rollouts/vllm/nccl.py calls, with the prototypes of nccl.h
   (https://github.com/NVIDIA/nccl/blob/master/src/nccl.h.in): they write down what they were called with. */

#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

typedef struct ncclComm* ncclComm_t;
typedef struct CUstream_st* cudaStream_t;
typedef struct { char internal[128]; } ncclUniqueId;
typedef enum { ncclSuccess = 0, ncclInvalidArgument = 4, ncclInvalidUsage = 5 } ncclResult_t;
typedef enum { ncclSum = 0, ncclProd = 1 } ncclRedOp_t;
typedef enum { ncclInt8 = 0, ncclUint8 = 1, ncclFloat16 = 6, ncclFloat32 = 7 } ncclDataType_t;

static char said[4096];

#define SAY(...) snprintf(said + strlen(said), sizeof said - strlen(said), __VA_ARGS__)

const char* stub_said(void) { return said; }

const char* ncclGetErrorString(ncclResult_t result) {
  return result == ncclInvalidUsage ? "invalid usage" : "another error";
}

ncclResult_t ncclGetUniqueId(ncclUniqueId* unique) {
  for (int i = 0; i < 128; i++) unique->internal[i] = (char)(255 - i);
  return ncclSuccess;
}

ncclResult_t ncclCommInitRank(ncclComm_t* comm, int nranks, ncclUniqueId unique, int rank) {
  for (int i = 0; i < 128; i++)
    if (unique.internal[i] != (char)(255 - i)) return ncclInvalidArgument;
  SAY("join %d %d\n", nranks, rank);
  *comm = (ncclComm_t)(uintptr_t)0x7f0123456789;
  return nranks > 1 ? ncclSuccess : ncclInvalidUsage;
}

ncclResult_t ncclAllReduce(const void* from, void* to, size_t count, ncclDataType_t type, ncclRedOp_t op, ncclComm_t comm,
                           cudaStream_t stream) {
  SAY("sum %p %p %zu %d %p %p\n", from, to, count, type == ncclFloat32 && op == ncclSum, (void*)comm, (void*)stream);
  return ncclSuccess;
}

ncclResult_t ncclBroadcast(const void* from, void* to, size_t count, ncclDataType_t type, int root, ncclComm_t comm,
                           cudaStream_t stream) {
  SAY("broadcast %p %p %zu %d %d %p %p\n", from, to, count, type == ncclUint8, root, (void*)comm, (void*)stream);
  return ncclSuccess;
}

ncclResult_t ncclCommAbort(ncclComm_t comm) {
  SAY("abort %p\n", (void*)comm);
  return ncclSuccess;
}
