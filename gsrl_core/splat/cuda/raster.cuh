// Tiles drawn front to back: each list is sorted in shared memory and blended at once, over the static part.
#pragma once

#include "sort.cuh"

constexpr int BLOCKS_AT_ONCE = 5;  // on one multiprocessor: shared memory allows no more
constexpr int STEP = 4;            // Gaussians blended at a time

// What is drawn: the static part, or bodies over it.
enum Kind { STATIC_PART, BODIES };

struct Pixel {
    float x, y;        // centre
    bool alive;        // inside the picture, and the light has not run out
    float light;       // left behind all that was drawn
    float r, g, b;
    float depth_sum;   // weight times depth (static part, extras)
    float front;       // light left in front of the static surface
    float surface;     // its depth
    float open;        // what it lets through
    float weight;      // drawn by bodies (extras)
    int owner;         // body at which alpha first reached one half (extras)
};

// Blends STEP staged Gaussians, each a = (mean x, mean y, A, B), b = (C, log2 opacity, depth, body bits), c = colour,
// where log2 alpha = log2 opacity - A dx^2 - B dx dy - C dy^2. All alphas first: they do not wait for each other.
template <Kind KIND, bool BEHIND, bool EXTRAS>
__device__ __forceinline__ void blend_step(const float4* staged, Pixel& p) {
    float alpha[STEP], depth[STEP];
    int body[STEP];
#pragma unroll
    for (int k = 0; k < STEP; k++) {
        float4 a = staged[k * STAGED], b = staged[k * STAGED + 1];
        float dx = a.x - p.x, dy = a.y - p.y;
        float exponent = fmaf(-(b.x * dy), dy, fmaf(-fmaf(a.z, dx, a.w * dy), dx, b.y));
        alpha[k] = exponent >= LOG2_ALPHA_MIN ? fminf(fast_exp2(exponent), ALPHA_MAX) : 0.f;
        depth[k] = b.z;
        body[k] = __float_as_int(b.w);
    }
#pragma unroll
    for (int k = 0; k < STEP; k++) {
        float4 c = staged[k * STAGED + 2];
        float weight = p.light * alpha[k], after = p.light - weight;
        bool behind = BEHIND && depth[k] > p.surface;
        p.alive = p.alive && after > TRANSMITTANCE_MIN;
        if (behind) weight *= p.open;
        if (!p.alive) continue;
        p.light = after;
        if (BEHIND && !behind) p.front = after;
        if (EXTRAS) {
            float before = p.weight + (behind ? p.front * (1.f - p.open) : 0.f);
            if (before < 0.5f && before + weight >= 0.5f) p.owner = body[k];
            p.weight += weight;
        }
        p.r += weight * c.x;
        p.g += weight * c.y;
        p.b += weight * c.z;
        if (KIND == STATIC_PART || EXTRAS) p.depth_sum += weight * depth[k];
    }
}

// Reads a record and writes what blending needs of it.
template <bool EXTRAS>
__device__ __forceinline__ void stage(const Args& a, float4* out, const float4* records, u64 key) {
    u32 at = (u32)key >> 8;
    float4 r0 = __ldg(records + 2 * at), r1 = __ldg(records + 2 * at + 1);
    float scale = __fdividef(0.5f * LOG2E, difference_of_products(r0.z, r1.x, r0.w, r0.w));
    u32 low = __float_as_uint(r1.z), high = __float_as_uint(r1.w);
    int body = EXTRAS ? __ldg(&a.chunks[a.first_chunk + at / CHUNK].z) : 0;
    out[0] = make_float4(r0.x, r0.y, r1.x * scale, -2.f * r0.w * scale);
    out[1] = make_float4(r0.z * scale, r1.y, __uint_as_float((u32)(key >> 32)), __int_as_float(body));
    out[2] = make_float4(__uint_as_float(low << 10 & 0x7ffffc00u),
                         __uint_as_float((low >> 21 | high << 11) << 10 & 0x7ffffc00u),
                         __uint_as_float(high & 0x7ffffc00u), 0.f);
}

// Fills up to a whole step. Far away, so that it counts as behind like all that would follow (finite: times a weight of
// zero it must give zero).
__device__ __forceinline__ void stage_nothing(float4* out) {
    out[0] = out[2] = make_float4(0.f, 0.f, 0.f, 0.f);
    out[1] = make_float4(0.f, -1e30f, 1e30f, 0.f);
}

// Blends s.sorted[0 .. count) into the warp's pixels; no barrier of the block inside.
template <Kind KIND, bool EXTRAS>
__device__ __forceinline__ void blend_sorted(const Args& a, Shared& s, u32 count, const float4* records,
                                             float nearest_surface, Pixel& p) {
    u32 lane = lane_id(), warp = warp_id();
    float4* staged = s.staged[warp];
    u64* waiting = s.waiting[warp];
    u32 at = 0, fill = 0;
    while (__any_sync(~0u, p.alive)) {
        while (fill < 32 && at < count) {
            u64 key = at + lane < count ? s.sorted[at + lane] : 0;
            bool touches = key >> warp & 1;
            u32 vote = __ballot_sync(~0u, touches);
            if (touches) waiting[fill + __popc(vote & lanes_below())] = key;
            fill += __popc(vote);
            at += 32;
        }
        if (!fill) break;
        __syncwarp();
        u32 used = min(fill, 32u);
        u64 key = waiting[lane], later = waiting[32 + lane];
        if (lane < used)
            stage<EXTRAS>(a, staged + lane * STAGED, records, key);
        else
            stage_nothing(staged + lane * STAGED);
        float farthest = __uint_as_float((u32)(__shfl_sync(~0u, key, used - 1) >> 32));
        __syncwarp();
        waiting[lane] = later;
        fill -= used;
        if (KIND == BODIES && (EXTRAS || farthest > nearest_surface)) {
            for (u32 i = 0; i < used; i += STEP) blend_step<KIND, true, EXTRAS>(staged + i * STAGED, p);
        } else {
            for (u32 i = 0; i < used; i += STEP) blend_step<KIND, false, EXTRAS>(staged + i * STAGED, p);
            p.front = p.light;
        }
        __syncwarp();
    }
}

// Draws one list of `count` entries, in whatever order they lie; every thread of the block takes part.
template <Kind KIND, bool EXTRAS>
__device__ __forceinline__ void draw_list(const Args& a, Shared& s, const u64* list, u32 count,
                                          const float4* records, Pixel& p) {
    if (!count) return;
    float nearest_surface = 0.f;
    if (KIND == BODIES) nearest_surface = __uint_as_float(__reduce_min_sync(~0u, __float_as_uint(p.surface)));
    if (threadIdx.x == 0) s.nearest = ~0u, s.farthest = 0, s.list = list, s.count = count;
    __syncthreads();
    u32 nearest = ~0u, farthest = 0;
    for (u32 i = threadIdx.x; i < count; i += THREADS) {
        u32 depth = (u32)(__ldg(list + i) >> 32);
        nearest = min(nearest, depth), farthest = max(farthest, depth);
    }
    nearest = __reduce_min_sync(~0u, nearest), farthest = __reduce_max_sync(~0u, farthest);
    if (lane_id() == 0) atomicMin(&s.nearest, nearest), atomicMax(&s.farthest, farthest);
    __syncthreads();
    u64 lo = (u64)s.nearest << 32, last = (u64)s.farthest << 32 | 0xffffffffu, hi = last;
    while (true) {  // entries with lo <= key <= hi, cut into equal buckets
        int shift = max(0, 64 - __clzll(hi - lo) - 10);
        ((uint4*)s.ends)[threadIdx.x] = make_uint4(0, 0, 0, 0);
        __syncthreads();
        for (u32 i = threadIdx.x; i < count; i += THREADS) {
            u64 key = __ldg(list + i);
            if (key >= lo && key <= hi) atomicAdd(&s.ends[(key - lo) >> shift], 1u);
        }
        __syncthreads();
        uint2 fitting = sum_buckets(s);
        if (!fitting.x) {  // the first bucket alone is too long: cut that one
            hi = lo + (1ull << shift) - 1;
            continue;
        }
        u64 end = min(lo + ((u64)fitting.x << shift), hi + 1);
        for (u32 i = threadIdx.x; i < count; i += THREADS) {
            u64 key = __ldg(list + i);
            if (key >= lo && key < end) s.bucketed[atomicAdd(&s.ends[(key - lo) >> shift], 1u)] = key;
        }
        bool more = end <= last;
        if (more && threadIdx.x == 0) s.next = end, s.last = last;
        __syncthreads();
        sort_buckets(s, fitting.y, lo, shift);
        __syncthreads();
        blend_sorted<KIND, EXTRAS>(a, s, fitting.y, records, nearest_surface, p);
        if (!more || !__syncthreads_or(p.alive)) return;
        lo = reload(s.next), last = hi = reload(s.last), list = reload(s.list), count = reload(s.count);
    }
}

__device__ __forceinline__ uint8_t to_byte(float value) {
    return (uint8_t)(fminf(fmaxf(value, 0.f), 1.f) * 255.f + 0.5f);
}

__device__ __forceinline__ void put_picture(uint8_t* out, const Args& a, float r, float g, float b, float beyond) {
    out[0] = to_byte(r + beyond * a.background[0]);
    out[1] = to_byte(g + beyond * a.background[1]);
    out[2] = to_byte(b + beyond * a.background[2]);
}

struct Surface {
    float r, g, b, depth, mean_depth, open;
};

// The finished static part: its surface hides bodies from CONTACT_TOLERANCE behind it.
__device__ __forceinline__ Surface surface_of(const Pixel& p) {
    float alpha = 1.f - p.light, mean = p.depth_sum / fmaxf(alpha, 1e-10f);
    return {p.r, p.g, p.b, alpha > SURFACE_ALPHA ? mean + CONTACT_TOLERANCE : INFINITY, mean, p.light};
}

// Nothing drawn yet, all light left.
__device__ __forceinline__ void clear(Pixel& p, bool inside) {
    p.alive = inside;
    p.light = p.front = 1.f;
    p.r = p.g = p.b = p.depth_sum = p.weight = 0.f;
    p.owner = -1;
    p.surface = INFINITY;
    p.open = 1.f;
}

// Where a thread's pixel of a tile is.
struct Place {
    int environment, tile, x, y;
    bool inside;
    size_t pixel;  // in the pictures
};

__device__ __forceinline__ Place place_of(const Args& a, u32 item) {
    int tiles = tile_count(a), across = tiles_x(a);
    Place at;
    at.environment = item / tiles, at.tile = item % tiles;
    at.x = at.tile % across * TILE + 8 * (warp_id() & 1) + (lane_id() & 7);
    at.y = at.tile / across * TILE + 4 * (warp_id() >> 1) + (lane_id() >> 3);
    at.inside = at.x < a.width && at.y < a.height;
    at.pixel = ((size_t)at.environment * a.height + at.y) * a.width + at.x;
    return at;
}

__device__ __forceinline__ size_t layer_row(const Args& a, int environment) {
    return a.layer_rows ? __ldg(a.layer_rows + environment) : 0;
}

// The pixel in the pictures of the static part.
__device__ __forceinline__ size_t layer_pixel(const Args& a, const Place& at) {
    return (layer_row(a, at.environment) * a.height + at.y) * a.width + at.x;
}

template <Kind KIND, bool EXTRAS>
__device__ __forceinline__ void draw_list_of(const Args& a, Shared& s, const Place& at, Pixel& p) {
    int tiles = tile_count(a), list = KIND == BODIES && a.mode == LIVE;
    size_t index = ((size_t)at.environment * list_count(a) + list) * tiles + at.tile;
    const u64* keys = a.keys + (size_t)at.environment * a.room + a.starts[index];
    const float4* records = a.records + (size_t)at.environment * a.chunk_count * CHUNK * 2;
    draw_list<KIND, EXTRAS>(a, s, keys, a.counts[index], records, p);
}

// Draws the tile s.item.
template <int MODE, bool EXTRAS>
__device__ __forceinline__ void draw_tile(const Args& a, Shared& s) {
    Pixel p;
    Surface surface = {};
    {
        Place at = place_of(a, s.item);
        p.x = at.x + 0.5f, p.y = at.y + 0.5f;
        clear(p, at.inside);
        if (MODE != OVER_LAYER) {
            draw_list_of<STATIC_PART, false>(a, s, at, p);
            surface = surface_of(p);
        } else if (at.inside) {
            size_t pixel = layer_pixel(a, at);
            surface.depth = __ldg(&a.layer_color[pixel].w);
            surface.open = __ldg(&a.layer_open[pixel].x);
        }
    }
    if (MODE == STATIC_ONLY) {
        Place at = place_of(a, reload(s.item));
        if (!at.inside) return;
        a.layer_color[at.pixel] = make_float4(surface.r, surface.g, surface.b, surface.depth);
        a.layer_open[at.pixel] = make_float2(surface.open, surface.mean_depth);
        put_picture(a.layer_picture + 3 * at.pixel, a, surface.r, surface.g, surface.b, surface.open);
        return;
    }
    {
        Place at = place_of(a, reload(s.item));
        clear(p, at.inside);
        if (at.inside) p.surface = surface.depth, p.open = surface.open;
        draw_list_of<BODIES, EXTRAS>(a, s, at, p);
    }
    Place at = place_of(a, reload(s.item));
    if (!at.inside) return;
    if (MODE == OVER_LAYER) {
        float4 color = __ldg(a.layer_color + layer_pixel(a, at));
        surface.r = color.x, surface.g = color.y, surface.b = color.z;
    }
    put_picture(a.rgb + 3 * at.pixel, a, p.r + p.front * surface.r, p.g + p.front * surface.g,
                p.b + p.front * surface.b, p.light * p.open);
    if (EXTRAS) {
        if (MODE == OVER_LAYER) surface.mean_depth = __ldg(&a.layer_open[layer_pixel(a, at)].y);
        float of_static = p.front * (1.f - p.open), total = p.weight + of_static;
        a.alpha[at.pixel] = total;
        a.depth[at.pixel] = total > 0.f ? (p.depth_sum + of_static * surface.mean_depth) / total : 0.f;
        a.body[at.pixel] = (int16_t)p.owner;
    }
}

// The next tile to draw, those with the longest lists first; ~0 if none is left.
__device__ __forceinline__ u32 next_tile(const Args& a, size_t tiles) {
    u32 ticket = atomicAdd(a.state + TICKET, 1u);
    for (int kind = 0; kind < CLASSES; kind++) {
        u32 length = a.state[QUEUES + kind];
        if (ticket < length) return a.queue[kind * tiles + ticket];
        ticket -= length;
    }
    return ~0u;
}

// Blocks take tiles from the queues until none is left.
template <int MODE, bool EXTRAS>
__global__ void __launch_bounds__(THREADS, BLOCKS_AT_ONCE) raster(Args a) {
    __shared__ Shared s;
    if (a.state[MOST_ENTRIES] > a.room) return;  // lists without room are not complete; the caller will see it too
    size_t tiles = (size_t)a.environments * tile_count(a);
    while (true) {
        if (threadIdx.x == 0) s.item = next_tile(a, tiles);
        __syncthreads();
        if (s.item == ~0u) return;
        draw_tile<MODE, EXTRAS>(a, s);
        __syncthreads();
    }
}

// Every environment's picture as it is without bodies.
__global__ void copy_layer(Args a, int words) {
    size_t area = (size_t)a.width * a.height * 3;
    const uint8_t* from = a.layer_picture + layer_row(a, blockIdx.y) * area;
    uint8_t* to = a.rgb + blockIdx.y * area;
    size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x;
    if (words) {
        if (i < area / 16) ((uint4*)to)[i] = __ldg((const uint4*)from + i);
    } else if (i < area) {
        to[i] = from[i];
    }
}
