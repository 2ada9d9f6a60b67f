// Sorting a tile's list in shared memory: into buckets of equal ranges of keys, then by rank within each bucket. Keys
// are all different, so the result does not depend on the order in which they came.
#pragma once

#include "args.cuh"

constexpr int CAPACITY = 1536;  // entries sorted at a time; longer lists are drawn piece by piece, nearest first
constexpr int BUCKETS = 1024;   // a power of two
constexpr int STAGED = 3;       // float4 for each Gaussian staged for blending

struct Shared {
    union {
        u64 bucketed[CAPACITY];
        float4 staged[WARPS][32 * STAGED];
    };
    u64 sorted[CAPACITY];
    alignas(16) u32 ends[BUCKETS];
    u64 waiting[WARPS][64];
    u32 scratch[WARPS];
    u32 nearest, farthest, item;
    // What is not needed while blending is kept here meanwhile, not in registers.
    const u64* list;
    u32 count;
    u64 next, last;
};
static_assert(sizeof(float4) * WARPS * 32 * STAGED <= sizeof(u64) * CAPACITY, "staging must fit");

// Reads shared memory here and not earlier.
template <class T>
__device__ __forceinline__ T reload(const T& value) {
    return *(const volatile T*)&value;
}

// Sorts the entries with lo <= key < end of s.bucketed, which lie bucket by bucket, into s.sorted.
__device__ __forceinline__ void sort_buckets(Shared& s, u32 count, u64 lo, int shift) {
    for (u32 i = threadIdx.x; i < count; i += THREADS) {
        u64 key = s.bucketed[i];
        u32 bucket = (u32)((key - lo) >> shift), first = bucket ? s.ends[bucket - 1] : 0, rank = first;
        for (u32 j = first, end = s.ends[bucket]; j < end; j++) rank += s.bucketed[j] < key;
        s.sorted[rank] = key;
    }
}

// Exclusive sums of s.ends, in place. If they exceed CAPACITY, only the leading buckets that fit are kept.
// Returns how many buckets and entries those are. All threads get the same answer.
__device__ __forceinline__ uint2 sum_buckets(Shared& s) {
    constexpr int EACH = 4;
    static_assert(EACH * THREADS == BUCKETS, "each thread sums four buckets");
    uint4 read = ((const uint4*)s.ends)[threadIdx.x];
    u32 counts[EACH] = {read.x, read.y, read.z, read.w}, starts[EACH];
    u32 own = read.x + read.y + read.z + read.w, sum = own;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        u32 other = __shfl_up_sync(~0u, sum, step);
        if (lane_id() >= step) sum += other;
    }
    if (lane_id() == 31) s.scratch[warp_id()] = sum;
    __syncthreads();
    u32 total = 0, running = sum - own;
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
        if (w < warp_id()) running += s.scratch[w];
        total += s.scratch[w];
    }
    int fitting = 0;
#pragma unroll
    for (int k = 0; k < EACH; k++) {
        starts[k] = running;
        running += counts[k];
        fitting += running <= CAPACITY;
    }
    ((uint4*)s.ends)[threadIdx.x] = make_uint4(starts[0], starts[1], starts[2], starts[3]);
    u32 buckets = BUCKETS;
    if (total > CAPACITY) {
        buckets = 0;
#pragma unroll
        for (int k = 1; k <= EACH; k++) buckets += __syncthreads_count(fitting >= k);
        total = buckets < BUCKETS ? s.ends[buckets] : total;
    }
    __syncthreads();
    return make_uint2(buckets, total);
}
