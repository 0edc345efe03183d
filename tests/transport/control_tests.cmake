kvern_test(test_transport_control SOURCES control_test.cc USES transport LIBRARIES cppzmq)

# Hostile peers speak UCX themselves: the worker of the module is compiled into the test as well.
kvern_test(test_transport_ucx
  SOURCES ucx_test.cc ${PROJECT_SOURCE_DIR}/transport/ucx_context.cc
  USES transport
  LIBRARIES kvern::ucx)
target_compile_definitions(test_transport_ucx PRIVATE KVERN_UCX_MODULE_FILE="$<TARGET_FILE:kvern_ucx>")
add_dependencies(test_transport_ucx kvern_ucx)
