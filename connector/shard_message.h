#pragma once

#include <cstdint>

#include "kernels/kv_shape.h"
#include "transport/wire.h"

namespace kvern {

/// Tells the daemon which layers and heads a shard has; tokens are not part of the message.
inline void describe_shard(const ShardShape& shape, wire::ShardMessage* shard) {
  shard->set_dtype(static_cast<std::uint32_t>(shape.dtype));
  shard->set_layer_begin(shape.layer_begin);
  shard->set_layers(shape.layers);
  shard->set_head_begin(shape.head_begin);
  shard->set_heads(shape.heads);
  shard->set_key_dim(shape.key_dim);
  shard->set_value_dim(shape.value_dim);
}

}  // namespace kvern
