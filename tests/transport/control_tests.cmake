kvern_test(test_transport_control SOURCES control_test.cc USES transport LIBRARIES cppzmq)
